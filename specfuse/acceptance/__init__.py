"""Rules of acceptance beside the exact one. Each of them is lossy, must be asked for, and labels the output.

``specfuse.generate(..., accept="exact")`` is the default and changes nothing.
"""

from __future__ import annotations

import os
from typing import Any

from specfuse.acceptance.calibration import AgreementModel
from specfuse.acceptance.cosine import CosineAcceptance
from specfuse.acceptance.rule import AcceptanceRule, Judgement, ScoredTree
from specfuse.acceptance.semantic import SemanticAcceptance, TokenEmbedding, default_embedding
from specfuse.acceptance.typical import TypicalAcceptance
from specfuse.models.checkpoint import load_tokenizer

__all__ = [
    "AcceptanceRule",
    "AgreementModel",
    "CosineAcceptance",
    "Judgement",
    "ScoredTree",
    "SemanticAcceptance",
    "TokenEmbedding",
    "TypicalAcceptance",
    "resolve_acceptance",
]


def resolve_acceptance(accept: AcceptanceRule | str, model: Any) -> AcceptanceRule | None:
    """A rule from what the ``accept`` argument may be; None is the exact one.

    Raises:
        ValueError: anything else; a name that needs more than a name, and what it needs.
    """
    if isinstance(accept, AcceptanceRule):
        return accept
    if accept == "exact":
        return None
    if accept == "typical":
        return TypicalAcceptance()
    if accept == "semantic":
        directory = getattr(model, "name_or_path", "")
        if not os.path.isdir(directory):
            raise ValueError(
                "accept='semantic' finds no tokenizer of the model: pass SemanticAcceptance(...)"
            )
        return SemanticAcceptance(load_tokenizer(directory), default_embedding())
    if accept == "cosine":
        raise ValueError(
            "accept='cosine' needs a calibration: specfuse align calibrate makes one; pass "
            "CosineAcceptance.from_pretrained(DIR)"
        )
    raise ValueError(
        f"accept must be 'exact', 'typical', 'semantic' or a rule of specfuse.acceptance, got {accept!r}"
    )
