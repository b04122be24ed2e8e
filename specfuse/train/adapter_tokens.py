"""What an adapter is worth in tokens: agreement with the target, and chains drafted along its answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specfuse.adapters import AdapterModel, kind_of
from specfuse.train.acceptance import block_figures, chain_figures
from specfuse.train.adapter_losses import logits_of, run_adapter, target_of
from specfuse.train.adapter_pairs import Pairs


class TokenScores:
    """Collects, part by part, how the tokens of drafter and adapter compare with the target's.

    Args:
        adapter: whose output is features of the target, or logits.
        pairs: with ``target_head``, unless features are logits; with ``source_head`` the drafter's own tokens
            are compared too.
    """

    def __init__(self, adapter: AdapterModel, pairs: Pairs):
        self.pairs = pairs
        self.head = None if kind_of(adapter) == "token-alignment" else pairs.target_head
        self.matches: dict[str, list[Tensor]] = {"before": [], "after": []}
        self.accepted: dict[str, list[Tensor]] = {"before": [], "after": []}

    def add(self, samples: Tensor, y: Tensor, target: Tensor) -> None:
        """Samples with what the adapter made of them and with what it should be."""
        wanted = logits_of(target, self.head)
        said = {"after": logits_of(y, self.head)}
        own = logits_of(self.pairs.sources(samples).to(target.device), self.pairs.source_head)
        if own.shape == wanted.shape and (self.pairs.source_head is not None or self.head is None):
            said["before"] = own
        for when, logits in said.items():
            self.matches[when].append((logits.argmax(-1) == wanted.argmax(-1)).flatten())
            overlap = torch.minimum(logits.softmax(-1), wanted.softmax(-1)).sum(-1)
            self.accepted[when].append(overlap.flatten())

    def figures(self, samples: Tensor, scores: Tensor, thresholds: tuple[float, ...]) -> dict[str, Any]:
        """Share of equal tokens and of accepted draws, before and after; the former by cosine; chains.

        ``accepted``: the chance ``sum_v min(p_v, q_v)`` that a token drawn from what drafter or adapter says
        is kept by speculative sampling. ``chain``: see :func:`specfuse.train.acceptance.chain_figures`, where
        pairs hold the answers of the samples.
        """
        match = {when: torch.cat(parts) for when, parts in self.matches.items() if parts}
        answers = None if self.pairs.answers is None else self.pairs.answers[samples]
        found: dict[str, Any] = {
            "match": {when: rounded(values.double().mean()) for when, values in match.items()},
            "accepted": {
                when: rounded(torch.cat(parts).double().mean())
                for when, parts in self.accepted.items()
                if parts
            },
            "match_at": {
                t: {
                    "share": rounded(kept.double().mean()),
                    "match": rounded(match["after"][kept].double().mean()),
                }
                for t in thresholds
                if (kept := scores >= t).any()
            },
        }
        if answers is not None:
            found["chain"] = {
                when: chain_figures([row.tolist() for row in _by_answer(values.cpu(), answers)])
                for when, values in match.items()
            }
        return found


@torch.no_grad()
def block_report(adapter: AdapterModel, pairs: Pairs, samples: Tensor) -> dict[str, Any]:
    """Of a compression drafter: how often its K tokens are right by depth, and what blocks of them save.

    "constant": the same for the most frequent token that training has at each depth. ``block``: see
    :func:`specfuse.train.acceptance.block_figures`, where pairs hold the answers of the samples.
    """
    usual = pairs.target[pairs.part("train")].mode(0).values
    parts = [
        (run_adapter(adapter, pairs, part).argmax(-1) == target_of(adapter, pairs, part)).cpu()
        for part in samples.split(128)
    ]
    right = {"constant": pairs.target[samples] == usual, "after": torch.cat(parts)}
    found: dict[str, Any] = {
        "right_by_depth": {
            when: [rounded(v) for v in values.double().mean(0)] for when, values in right.items()
        },
    }
    if pairs.answers is not None:
        answers = pairs.answers[samples]
        found["block"] = {
            when: block_figures([rows.tolist() for rows in _by_answer(values, answers)])
            for when, values in right.items()
        }
    return found


def _by_answer(values: Tensor, answers: Tensor) -> tuple[Tensor, ...]:
    """Splits samples, which stand answer by answer, at the borders."""
    return values.split(answers.unique_consecutive(return_counts=True)[1].tolist())


def rounded(value: Tensor) -> float:
    """A figure of a report, to four digits."""
    return round(float(value), 4)
