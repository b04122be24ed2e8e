"""Cosine acceptance: a draft may stand where the drafter's state, adapted, looks like the target's."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specfuse.acceptance.calibration import AgreementModel
from specfuse.acceptance.rule import AcceptanceRule, Judgement, ScoredTree
from specfuse.adapters import AdapterModel, LinearAdapter, kind_of, load_adapter
from specfuse.drafters import Drafter
from specfuse.ops.adapter_cosine import ResidualMLPWeights, adapter_cosine
from specfuse.train.adapter_pairs import fit_width

FUSED = ("linear", "residual-mlp", "lightweight")


class CosineAcceptance(AcceptanceRule):
    """Accepts a draft by how alike the states are that drafter and target drew their tokens from. **Lossy.**

    With c the cosine of the adapted drafter state and the target's at a node, and q the drafter's probability
    of a child there, a calibration estimates e = P(the target chooses the child | c, q). A child that the
    target did not choose is kept while the product of e over all tokens so kept in a pass is at least
    ``1 - max_disagreement``. With ``threshold`` instead, it is kept where c reaches that, uncalibrated.

    What this is good for: after the pass the target's choice is known, and where the rule keeps another token
    it *does* disagree; the estimate does not undo that. What it bounds is the share of trusted drafts that
    turn out to disagree: of all drafts with e >= 0.9, at most about a tenth, and those are the ones kept
    against the target. That buys the tokens behind them in the same pass. Read ``trusted`` in the output for
    estimate and measurement side by side, and ``measured_agreement`` for what an answer paid.

    Args:
        adapter: from drafter states to the target's: linear, residual-mlp or lightweight; None: states are
            compared as they are (cut or filled up with zeros to one width), as suits a head on the target.
        calibration: for this drafter, this adapter and this target.
        max_disagreement: in (0, 1), with a calibration.
        threshold: in [-1, 1], instead of one.

    Raises:
        ValueError: both or neither of calibration and threshold, a value out of range, or another adapter.

    Source: calibration as in :mod:`specfuse.acceptance.calibration`.
    """

    name = "cosine"
    needs_states = True

    def __init__(
        self,
        adapter: AdapterModel | None = None,
        calibration: AgreementModel | None = None,
        *,
        max_disagreement: float = 0.1,
        threshold: float | None = None,
    ):
        if (calibration is None) == (threshold is None):
            raise ValueError(
                "give either calibration (specfuse align calibrate makes one) or threshold, "
                f"got {'neither' if threshold is None else 'both'}"
            )
        if not 0.0 < max_disagreement < 1.0:
            raise ValueError(f"max_disagreement must lie in (0, 1), got {max_disagreement}")
        if threshold is not None and not -1.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must lie in [-1, 1], got {threshold}")
        if adapter is not None and (not isinstance(adapter, AdapterModel) or kind_of(adapter) not in FUSED):
            raise ValueError(
                f"adapter must be one of {', '.join(FUSED)} or None, got {type(adapter).__name__}"
            )
        self.adapter, self.calibration = adapter, calibration
        self.max_disagreement, self.threshold = max_disagreement, threshold

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], *, max_disagreement: float = 0.1
    ) -> CosineAcceptance:
        """A rule from a directory in which ``specfuse align calibrate`` left ``calibration.json``.

        The adapter is the one in the same directory, where it holds one.

        Raises:
            FileNotFoundError: no such directory, or no calibration in it.
            ValueError: broken files, or a value out of range.
        """
        calibration = AgreementModel.load(directory)
        adapter = load_adapter(directory) if calibration.about.get("adapter", True) else None
        return cls(adapter, calibration, max_disagreement=max_disagreement)

    def settings(self) -> dict[str, Any]:
        told: dict[str, Any] = {"adapter": None if self.adapter is None else kind_of(self.adapter)}
        if self.threshold is not None:
            return told | {"threshold": self.threshold}
        assert self.calibration is not None
        return told | {"calibration": self.calibration.kind, "max_disagreement": self.max_disagreement}

    def check(self, drafter: Drafter | None) -> None:
        super().check(drafter)
        made_for = None if self.calibration is None else self.calibration.about.get("drafter")
        if drafter is not None and made_for not in (None, type(drafter).__name__):
            raise ValueError(
                f"accept: the calibration was made for {made_for}, not for {type(drafter).__name__}"
            )

    def judge(self, scored: ScoredTree) -> Judgement:
        scored.tally.estimated = scored.tally.estimated or 0.0 if self.threshold is None else None
        cosines = node_cosines(scored, self.adapter)
        if self.threshold is not None:
            return _Alike(scored, cosines, self.threshold)
        assert self.calibration is not None
        return _Estimated(scored, estimates(scored, cosines, self.calibration), 1 - self.max_disagreement)


def node_cosines(scored: ScoredTree, adapter: AdapterModel | None) -> list[dict[int, float]]:
    """Per row, the cosine at every node that has children and states of both models."""
    cosines: list[dict[int, float]] = [{} for _ in scored.tokens]
    places, mine, its = [], [], []
    for row, children in enumerate(scored.children):
        for node in range(len(children)):
            kept = scored.state.draft_states
            state = kept.of(row, scored.path(row, node)) if children[node] and kept is not None else None
            if state is not None and scored.target_states is not None:
                places.append((row, node))
                mine.append(state)
                its.append(scored.target_states[row, node])
    if places:
        scores = cosines_of(torch.stack(mine), torch.stack(its), adapter).tolist()
        for (row, node), score in zip(places, scores, strict=True):
            cosines[row][node] = score
    return cosines


@torch.no_grad()
def cosines_of(drafter: Tensor, target: Tensor, adapter: AdapterModel | None) -> Tensor:
    """``[M]`` float32 cosines of drafter states ``[M, I]``, adapted, and target states ``[M, D]``."""
    target = target.detach()
    drafter = drafter.detach().to(target)
    if not isinstance(adapter, LinearAdapter):
        drafter = fit_width(drafter, target.shape[-1])
    if adapter is None:
        # The fused op with a residual that adds nothing: the identity.
        wide = target.shape[1]
        zeros = [target.new_zeros(shape) for shape in ((1, wide), (1,), (wide, 1), (wide,))]
        return adapter_cosine(drafter, ResidualMLPWeights._make(zeros), target, 0.0).score
    if (adapter.device, adapter.dtype) != (target.device, target.dtype):
        adapter.to(target.device, target.dtype)
    return adapter_cosine(drafter, adapter, target, 0.0).score  # type: ignore[arg-type]


def draft_chance(scored: ScoredTree, row: int, child: int) -> float:
    """The drafter's probability of a child, given its parent; NaN where the drafter has none."""
    probs = scored.tree.probs
    if probs is None:
        return float("nan")
    above = float(probs[row, int(scored.tree.parents[row, child])])
    return float(probs[row, child]) / above if above > 0 else float("nan")


def estimates(
    scored: ScoredTree, cosines: list[dict[int, float]], calibration: AgreementModel
) -> list[dict[int, float]]:
    """Per row, each drafted node's estimated chance to be what the target chooses."""
    places = [
        (row, child, c)
        for row, of_row in enumerate(cosines)
        for node, c in of_row.items()
        for child in scored.children[row][node]
    ]
    chances = [draft_chance(scored, row, child) for row, child, _ in places]
    found = calibration.estimate(np.array([c for _, _, c in places]), np.array(chances)).tolist()
    out: list[dict[int, float]] = [{} for _ in cosines]
    for (row, child, _), chance in zip(places, found, strict=True):
        out[row][child] = chance
    return out


class _Alike(Judgement):
    """By the cosine alone: the likeliest child where it reaches the threshold."""

    def __init__(self, scored: ScoredTree, cosines: list[dict[int, float]], threshold: float):
        self.scored, self.cosines, self.threshold = scored, cosines, threshold

    def overrule(self, row: int, path: list[int]) -> list[int]:
        alike = self.cosines[row].get(path[-1], -2.0) >= self.threshold
        return self.scored.children[row][path[-1]][:1] if alike else []


class _Estimated(Judgement):
    """By the estimates; every row has the bound to itself."""

    def __init__(self, scored: ScoredTree, chances: list[dict[int, float]], least: float):
        self.scored, self.chances, self.least = scored, chances, least
        self.agreement = [1.0] * len(chances)  # product over what was kept against the target

    def visit(self, row: int, node: int) -> None:
        scored, child = self.scored, self.scored.children[row][node][0]
        chance = self.chances[row].get(child, 0.0)
        if chance >= self.least:
            scored.tally.trusted += 1
            scored.tally.estimated = (scored.tally.estimated or 0.0) + chance
            scored.tally.agreed += scored.tokens[row][child] == scored.picks[row][node]

    def overrule(self, row: int, path: list[int]) -> list[int]:
        children = self.scored.children[row][path[-1]]
        best = max(children, key=lambda child: self.chances[row].get(child, 0.0))
        together = self.agreement[row] * self.chances[row].get(best, 0.0)
        if together < self.least:
            return []
        self.agreement[row] = together
        return [best]
