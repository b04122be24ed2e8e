"""Typical acceptance: what the target finds plausible enough may stand."""

from __future__ import annotations

from typing import Any

import torch

from specfuse.acceptance.rule import AcceptanceRule, Judgement, ScoredTree


class TypicalAcceptance(AcceptanceRule):
    """Accepts a draft x that the target did not choose where it is typical of the target's distribution p::

        p(x) > min(epsilon, delta * exp(-H(p)))        H in nats

    The less sure the target is, the less is asked of a draft. Lossy, and not a sampling method: under
    sampling the answers no longer follow the target's distribution, at temperature 0 they are no longer its
    greedy answers. It buys tokens per pass where several continuations would do, and pays with answers that
    differ in words, now and then in facts.

    The variant: p is the target's distribution after the call's logits processors at the call's temperature
    (1 where greedy), before top-k, top-p and min-p. What the target chose comes first where it was drafted
    (Medusa accepts the greedy token for the first position only); among several typical siblings the most
    probable one goes on.

    Args:
        epsilon: hard threshold on p(x), in (0, 1].
        delta: threshold relative to ``exp(-H)``, in (0, 1]; sqrt(epsilon) in the paper's code.

    Raises:
        ValueError: a threshold outside (0, 1].

    Source: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
    ICML 2024, section 2.3.1; defaults of its code (posterior_threshold 0.09, posterior_alpha 0.3).
    """

    name = "typical"

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3):
        for name, value in (("epsilon", epsilon), ("delta", delta)):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1], got {value}")
        self.epsilon, self.delta = epsilon, delta

    def settings(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon, "delta": self.delta}

    def judge(self, scored: ScoredTree) -> Judgement:
        logits = scored.logits.float() / (scored.temperature or 1.0)
        log_p = logits.log_softmax(-1)
        entropy = torch.special.entr(log_p.exp()).sum(-1)
        floor = torch.clamp(self.delta * torch.exp(-entropy), max=self.epsilon)
        parents = scored.tree.parents.clamp(min=0).to(log_p.device, torch.int64)
        tokens = scored.tree.tokens.clamp(0, log_p.shape[-1] - 1).to(log_p.device)
        rows = torch.arange(len(tokens), device=log_p.device)[:, None]
        chance = log_p[rows, parents, tokens].exp()
        # NaN compares false: a node without a distribution accepts nothing.
        typical = torch.where(chance > floor.gather(1, parents), chance, torch.zeros_like(chance))
        return _Typical(scored, typical.tolist())


class _Typical(Judgement):
    def __init__(self, scored: ScoredTree, chances: list[list[float]]):
        self.scored, self.chances = scored, chances  # [B][N] p of each node's token, 0 where not typical

    def overrule(self, row: int, path: list[int]) -> list[int]:
        found = [child for child in self.scored.children[row][path[-1]] if self.chances[row][child] > 0]
        return [max(found, key=lambda child: self.chances[row][child])] if found else []
