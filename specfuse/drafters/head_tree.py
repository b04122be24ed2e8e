"""The tree that a HeadDrafter grows, level by level, in tensors: the device is waited for once at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from specfuse.drafters.base import DraftState
from specfuse.drafters.head_layer import DraftHead
from specfuse.drafters.same_noise import pick_alike, root_positions, samples
from specfuse.tree import TokenTree


class HeadTree:
    """B trees whose most probable nodes go on.

    Args:
        state: of the call.
        branching: children of a node, and nodes of a level that go on.
        head: whose shortlist the logits are of.

    Attributes:
        depth: levels so far.
        tokens: ``[B, k]`` tokens of the frontier, the nodes of the last level that go on.
        above: ``[B, k]`` place of each frontier node's parent in the frontier before.
    """

    def __init__(self, state: DraftState, branching: int, head: DraftHead):
        self.state, self.branching, self.shortlist = state, branching, head.shortlist
        self.vocabulary = head.config.vocabulary
        self.depth = 0
        self.tokens = self.above = torch.zeros(0, dtype=torch.int64)
        self._chances: Tensor | None = None
        # Per level: tokens and chances [B, n] of its nodes, and which of them went on, [B, k].
        self._levels: list[tuple[Tensor, Tensor, Tensor]] = []
        self._positions = root_positions(state) if samples(state) else None

    def add_level(self, logits: Tensor) -> float:
        """Adds children of the frontier from its ``logits [B, k, n]``; the best of them are the new frontier.

        Returns:
            The chance that the frontier of a row is reached, of the row that is likeliest to get there.
        """
        chances, tokens = logits.float().softmax(-1).topk(min(self.branching, logits.shape[2]))
        if self.shortlist is not None:
            tokens = self.shortlist[tokens]
        if self._positions is not None:
            picked = self._picked(logits, self._positions + self.depth)[..., None]
            # In front what the target would pick if it agreed, as likely as anything here; once is enough.
            chances = torch.cat([chances[..., :1], chances.masked_fill(tokens == picked, 0.0)], dim=2)
            tokens = torch.cat([picked, tokens], dim=2)
        if self._chances is not None:
            chances = chances * self._chances[..., None]
        width, flat, flat_tokens = tokens.shape[2], chances.flatten(1), tokens.flatten(1)
        self._chances, order = flat.topk(min(self.branching, flat.shape[1]))
        self._levels.append((flat_tokens, flat, order))
        self.tokens, self.above = flat_tokens.gather(1, order), order // width
        self.depth += 1
        return self._chances.sum(1).max().item()

    def _picked(self, logits: Tensor, positions: Tensor) -> Tensor:
        if self.shortlist is not None:
            every = logits.new_full((*logits.shape[:2], self.vocabulary), -float("inf"))
            logits = every.index_copy(2, self.shortlist, logits)
        return pick_alike(self.state, logits, positions)

    def best(self, max_nodes: int, min_prob: float) -> TokenTree:
        """The most probable nodes: a tree, since chances fall along a path."""
        levels = [[part.tolist() for part in level] for level in self._levels]
        rows = [self._best_of(b, levels, max_nodes, min_prob) for b in range(self.state.batch_size)]
        return TokenTree.from_parents(*map(list, zip(*rows, strict=True)))

    def _best_of(
        self, row: int, levels: list[list[list[list]]], max_nodes: int, min_prob: float
    ) -> tuple[list[int], list[int], list[float]]:
        tokens, parents, chances = [self.state.root(row)], [-1], [1.0]
        frontier = [0]  # ids; the root is 0
        deepest = self.state.remaining[row] - 1 if self.state.active[row] else 0
        for level in levels[: max(deepest, 0)]:
            level_tokens, level_chances, order = (part[row] for part in level)
            first, width = len(tokens), len(level_tokens) // len(frontier)
            tokens += level_tokens
            chances += level_chances
            parents += [node for node in frontier for _ in range(width)]
            frontier = [first + place for place in order]
        likely = [i for i in range(1, len(tokens)) if chances[i] > 0 and chances[i] >= min_prob]
        # A parent comes before its children, and sorting is stable.
        likely.sort(key=lambda i: -chances[i])
        chosen = [0, *sorted(likely[:max_nodes])]
        place = {node: i for i, node in enumerate(chosen)}
        above = [-1, *(place[parents[i]] for i in chosen[1:])]
        return [tokens[i] for i in chosen], above, [chances[i] for i in chosen]
