"""Rules of acceptance beside the exact one. Each of them is lossy, must be asked for, and labels the output.

``specfuse.generate(..., accept="exact")`` is the default and changes nothing.
"""

from __future__ import annotations

from typing import Any

from specfuse.acceptance.rule import AcceptanceRule, Judgement, ScoredTree
from specfuse.acceptance.typical import TypicalAcceptance

__all__ = ["AcceptanceRule", "Judgement", "ScoredTree", "TypicalAcceptance", "resolve_acceptance"]


def resolve_acceptance(accept: AcceptanceRule | str, model: Any) -> AcceptanceRule | None:
    """A rule from what the ``accept`` argument may be; None is the exact one.

    Raises:
        ValueError: anything else; a name that needs more than a name.
    """
    if isinstance(accept, AcceptanceRule):
        return accept
    if accept == "exact":
        return None
    if accept == "typical":
        return TypicalAcceptance()
    raise ValueError(f"accept must be 'exact', 'typical' or a rule of specfuse.acceptance, got {accept!r}")
