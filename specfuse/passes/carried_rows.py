"""Which rows of a batch the target's passes carry: finished ones are dropped once that pays."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from specfuse.ops.verify_tree import AcceptedPath
from specfuse.passes.tree_forward import TreeForward
from specfuse.tree import TokenTree
from specfuse.verify import TokenChoice, Verified, verify

# Dropping moves the other rows' KV, which costs about as much as a pass reads of it: a quarter of the rows
# and a few passes to come make up for it.
SHARE, AHEAD = 4, 8


class CarriedRows:
    """The rows that are left of B; what callers see stays ``[B, ...]``.

    Args:
        batch: B.
    """

    def __init__(self, batch: int):
        self.batch, self.rows = batch, list(range(batch))
        self.choice: TokenChoice | None = None

    @property
    def all_there(self) -> bool:
        """Whether nothing was dropped yet."""
        return len(self.rows) == self.batch

    def drop(
        self, active: list[bool], remaining: list[int], target: TreeForward, choice: TokenChoice
    ) -> None:
        """Lets go of finished rows where that pays; between two passes."""
        running = [row for row in self.rows if active[row]]
        finished = len(self.rows) - len(running)
        if finished * SHARE < len(self.rows) or max((remaining[row] for row in running), default=0) < AHEAD:
            return
        target.keep_rows([place for place, row in enumerate(self.rows) if active[row]])
        self.rows = running
        self.choice = dataclasses.replace(choice, seeds=choice.seeds[running])

    def forward(self, target: TreeForward, tree: TokenTree, ids: Tensor) -> Tensor:
        """A pass over the rows that are left, of trees and position ids of all rows."""
        if self.all_there:
            return target.forward_tree(tree, ids)
        return target.forward_tree(tree.rows(self.rows), ids[self.rows])

    def verify(self, logits: Tensor, tree: TokenTree, positions: Tensor) -> Verified:
        """Decides the rows that are left; nothing happens in the others."""
        assert self.choice is not None
        decided = verify(logits, tree.rows(self.rows), self.choice, positions[self.rows], []).accepted

        def widened(values: Tensor, nothing: float) -> Tensor:
            out = values.new_full((self.batch, *values.shape[1:]), nothing)
            out[self.rows] = values
            return out

        accepted = (widened(values, nothing) for values, nothing in zip(decided, (-1, 0, -1, 0), strict=True))
        return Verified(AcceptedPath(*accepted), None, None)

    def commit(self, target: TreeForward, accepted: AcceptedPath, kept: list[int]) -> None:
        """Keeps what was emitted, as ``TreeForward.commit``."""
        path, length = accepted.path, accepted.length
        if not self.all_there:
            there = torch.tensor(self.rows, device=path.device)
            path, length, kept = path[there], length[there], [kept[row] for row in self.rows]
        target.commit(path, length, kept)
