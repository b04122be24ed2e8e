"""The tree that a HeadDrafter grows, level by level, in tensors: the device is waited for once at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from specfuse.drafters.base import DraftState
from specfuse.drafters.same_noise import pick_alike, root_positions, samples
from specfuse.tree import TokenTree


class HeadTree:
    """B trees whose most probable nodes go on.

    Attributes:
        depth: levels so far.
        tokens: ``[B, k]`` tokens of the frontier, the nodes of the last level that go on.
        above: ``[B, k]`` place of each frontier node's parent in the frontier before.
    """

    def __init__(self, state: DraftState, branching: int, device: torch.device):
        self.state, self.branching = state, branching
        self.depth = 0
        self.tokens = self.above = torch.zeros((state.batch_size, 1), dtype=torch.int64, device=device)
        self._ids = self.tokens  # of the frontier; 0 is the root
        self._chances: Tensor | None = None
        self._sizes = [1]  # nodes of each level
        self._levels: list[tuple[Tensor, Tensor, Tensor]] = []  # tokens, parents, chances, each [B, n]
        self._positions = root_positions(state) if samples(state) else None

    def add_level(self, logits: Tensor) -> Tensor:
        """Adds children of the frontier from its ``logits [B, k, V]``; the best of them are the new frontier.

        Returns:
            The chance that the most probable new node of any row is reached, a scalar tensor.
        """
        chances, tokens = logits.float().softmax(-1).topk(min(self.branching, logits.shape[2]))
        if self._positions is not None:
            picked = pick_alike(self.state, logits, self._positions + self.depth)[..., None]
            # In front what the target would pick if it agreed, as likely as anything here; once is enough.
            chances = torch.cat([chances[..., :1], chances.masked_fill(tokens == picked, 0.0)], dim=2)
            tokens = torch.cat([picked, tokens], dim=2)
        if self._chances is not None:
            chances = chances * self._chances[..., None]
        width = tokens.shape[2]
        flat, flat_tokens = chances.flatten(1), tokens.flatten(1)
        self._levels.append((flat_tokens, self._ids.repeat_interleave(width, dim=1), flat))
        self._chances, order = flat.topk(min(self.branching, flat.shape[1]))
        self.above = order // width
        self.tokens = flat_tokens.gather(1, order)
        self._ids = order + sum(self._sizes)
        self._sizes.append(flat.shape[1])
        self.depth += 1
        return self._chances[:, 0].max()

    def best(self, max_nodes: int, min_prob: float) -> TokenTree:
        """The most probable nodes: a tree, since chances fall along a path."""
        columns = [torch.cat(parts, dim=1).tolist() for parts in zip(*self._levels, strict=True)]
        rows = []
        for b, (tokens, parents, chances) in enumerate(zip(*columns, strict=True)):
            root = self.state.root(b)
            deepest = self.state.remaining[b] - 1 if self.state.active[b] else 0
            inside = sum(self._sizes[1 : max(deepest, 0) + 1])
            # Candidate i is node i + 1. A parent comes before its children and sorting is stable.
            likely = [i for i, chance in enumerate(chances[:inside]) if chance > 0 and chance >= min_prob]
            likely.sort(key=lambda i: -chances[i])
            chosen = sorted(likely[:max_nodes])
            place = {0: 0} | {node + 1: i for i, node in enumerate(chosen, start=1)}
            rows.append(
                (
                    [root, *(tokens[i] for i in chosen)],
                    [-1, *(place[parents[i]] for i in chosen)],
                    [1.0, *(chances[i] for i in chosen)],
                )
            )
        return TokenTree.from_parents(*map(list, zip(*rows, strict=True)))
