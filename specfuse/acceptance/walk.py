"""The walk of a lossy call: the target's choice first, then what a rule lets stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specfuse.acceptance.rule import AcceptanceRule, Judgement, ScoredTree, Tally
from specfuse.drafters import Drafter
from specfuse.drafters.draft_states import DraftStates
from specfuse.ops.verify_tree import AcceptedPath
from specfuse.tree import TokenTree
from specfuse.verify import RowPrefixConstraint, TokenChoice, Verified, process_rows

if TYPE_CHECKING:
    from specfuse.run import GenerationRun

LOSSLESS = {"rule": "exact", "lossless": True}


class LossyWalk:
    """Decides the passes of one call by a rule; called in place of ``specfuse.verify.verify``.

    Every node of a tree is its own root to the fused op, with the noise of its place: what the target chooses
    there, whether or not the walk gets to it. A rule that never overrules gives exactly the lossless answer.

    Args:
        rule: of the call.
        run: the call; what the rule needs of target and drafter is switched on.
        drafter: of the call.

    Raises:
        ValueError: a drafter that the rule can not judge; a ``prefix_allowed_tokens_fn``, which may be asked
            about prefixes of its own making only.
    """

    def __init__(self, rule: AcceptanceRule, run: GenerationRun, drafter: Drafter | None):
        rule.check(drafter)
        if any(isinstance(each, RowPrefixConstraint) for each in run.choice.processors or []):
            raise ValueError(f"prefix_allowed_tokens_fn does not go with accept={rule.name!r}: pass 'exact'")
        self.rule, self.run, self.tally = rule, run, Tally()
        self.overruled: list[list[bool]] = [[] for _ in run.answers.prompts]  # of each token since the start
        if rule.needs_states:
            run.target.keeps_states = True
            run.state.draft_states = DraftStates(len(self.overruled))
        run.verify = self

    def __call__(
        self, logits: Tensor, tree: TokenTree, choice: TokenChoice, positions: Tensor, prompts: Any
    ) -> Verified:
        tokens, counts = tree.tokens.tolist(), tree.num_nodes.tolist()
        scores = _processed(logits, tree, choice, prompts)
        picked = pick_everywhere(scores, tree, choice, positions)
        scored = ScoredTree(
            scores,
            choice.temperature,
            tree,
            tokens,
            picked.next_token.reshape(logits.shape[:2]).tolist(),
            _children(tree, counts),
            self.run.target.states if self.rule.needs_states else None,
            self.run.state,
            self.tally,
            frozenset(self.run.answers.eos),
        )
        # A tree without drafts leaves nothing to judge.
        judgement = self.rule.judge(scored) if tree.width > 1 else Judgement()
        paths = [self._walk(scored, judgement, row) if count else [] for row, count in enumerate(counts)]
        return _verified(logits, scores, scored, choice, picked, paths)

    def _walk(self, scored: ScoredTree, judgement: Judgement, row: int) -> list[int]:
        """Nodes kept of one row's tree, the root first; notes which of them overrule the target."""
        tokens, picks, children = scored.tokens[row], scored.picks[row], scored.children[row]
        ends = self.run.answers.eos
        # What the last pass decided behind the end of an answer was not emitted.
        flags = self.overruled[row]
        del flags[len(self.run.answers.answers[row]) :]
        path = [0]
        while children[path[-1]] and picks[path[-1]] >= 0:
            node = path[-1]
            judgement.visit(row, node)
            agreed = [child for child in children[node] if tokens[child] == picks[node]]
            going = agreed or ([] if picks[node] in ends else judgement.overrule(row, list(path)))
            kept = _before_end(going, tokens, set() if agreed else ends)
            for child in kept:
                flags.append(tokens[child] != picks[path[-1]])
                path.append(child)
            if not kept:
                break
        flags.append(False)
        return path

    def label(self) -> dict[str, Any]:
        """What the output says about the call: its ``acceptance``."""
        told, tally = self.overruled, self.tally
        answers = self.run.answers.answers
        tokens = sum(map(len, answers))
        overruled = sum(sum(row[: len(answer)]) for row, answer in zip(told, answers, strict=True))
        label: dict[str, Any] = {
            "rule": self.rule.name,
            "lossless": False,
            "settings": self.rule.settings(),
            "tokens": tokens,
            "overruled": overruled,
            "measured_agreement": 1 - overruled / tokens if tokens else 1.0,
        }
        if tally.estimated is not None:
            trusted = tally.trusted
            label["trusted"] = {
                "drafts": trusted,
                "estimated_agreement": tally.estimated / trusted if trusted else None,
                "measured_agreement": tally.agreed / trusted if trusted else None,
            }
        if tally.fallback is not None:
            label["fallback"] = tally.fallback
        return label


def pick_everywhere(scores: Tensor, tree: TokenTree, choice: TokenChoice, positions: Tensor) -> AcceptedPath:
    """What the target chooses behind every node: ``B * N`` trees of a root alone, row after row."""
    batch, width, vocab = scores.shape
    taking = torch.arange(width) < tree.num_nodes[:, None]
    roots = TokenTree(
        tree.tokens.reshape(-1, 1),
        torch.full((batch * width, 1), -1, dtype=torch.int32),
        taking.flatten().to(torch.int32),
    )
    return choice.pick(
        scores.reshape(-1, 1, vocab),
        roots.to(scores.device),
        tree.positions(positions).flatten(),
        choice.seeds.repeat_interleave(width),
    )


def _processed(logits: Tensor, tree: TokenTree, choice: TokenChoice, prompts: list[list[int]]) -> Tensor:
    """Logits after the processors that are not fused, node by node: each is shown the node's own prefix."""
    if choice.processors is None:
        return logits
    out = torch.zeros_like(logits, dtype=torch.float32)
    counts, ancestors = tree.num_nodes.tolist(), tree.ancestor_mask()
    for node in range(tree.width):
        rows = [b for b, count in enumerate(counts) if count > node]
        if not rows:
            break
        drafted = {b: tree.tokens[b][ancestors[b, node]].tolist()[1:] for b in rows}
        prefixes = {b: [*prompts[b], *drafted[b]] for b in rows}
        scores = logits[rows, node].to(torch.float32)
        out[rows, node] = process_rows(choice.processors, scores, rows, prefixes, len(counts))
    return out


def _children(tree: TokenTree, counts: list[int]) -> list[list[list[int]]]:
    probs = None if tree.probs is None else tree.probs.tolist()
    every = []
    for b, (parents, count) in enumerate(zip(tree.parents.tolist(), counts, strict=True)):
        children: list[list[int]] = [[] for _ in range(tree.width)]
        for node in range(1, count):
            children[parents[node]].append(node)
        if probs is not None:
            children = [sorted(nodes, key=lambda node: -probs[b][node]) for nodes in children]
        every.append(children)
    return every


def _before_end(nodes: list[int], tokens: list[int], ends: set[int]) -> list[int]:
    """The nodes up to, not including, the first that would end the answer."""
    place = next((i for i, node in enumerate(nodes) if tokens[node] in ends), len(nodes))
    return nodes[:place]


def _verified(
    logits: Tensor,
    scores: Tensor,
    scored: ScoredTree,
    choice: TokenChoice,
    picked: AcceptedPath,
    paths: list[list[int]],
) -> Verified:
    batch, width = logits.shape[:2]
    device = logits.device
    padded = torch.tensor([[*path, *[-1] * (width - len(path))] for path in paths], dtype=torch.int32)
    path = padded.reshape(batch, width).to(device)
    next_tokens = [scored.picks[b][nodes[-1]] if nodes else -1 for b, nodes in enumerate(paths)]
    visited = path.clamp(min=0).to(torch.int64)
    logprobs = picked.logprobs.reshape(batch, width).gather(1, visited).masked_fill(path < 0, 0.0)
    accepted = AcceptedPath(
        path,
        torch.tensor([len(nodes) for nodes in paths], dtype=torch.int32, device=device),
        torch.tensor(next_tokens, dtype=torch.int64, device=device),
        logprobs,  # of what the target chose, also where a rule kept another token
    )

    def behind(values: Tensor) -> list[list[Tensor]]:
        return [[values[b, n].to(torch.float32, copy=True) for n in nodes] for b, nodes in enumerate(paths)]

    return Verified(
        accepted,
        behind(scores) if choice.keep_scores else None,
        behind(logits) if choice.keep_logits else None,
    )
