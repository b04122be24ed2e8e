"""The dense mask of a step, kept from step to step: only what a step changed is written again."""

from __future__ import annotations

import torch
from torch import Tensor

from specfuse.ops import native
from specfuse.passes.tree_layout import is_plain
from specfuse.tree import TokenTree


class StepMask:
    """``[B, N, slots]`` bool on the CPU: every node sees its row's committed slots and its own ancestors.

    Args:
        valid: ``[B, P]`` bool, False at padding; None where nothing is padded.
    """

    def __init__(self, valid: Tensor | None):
        self.valid = valid
        self.cells: Tensor | None = None
        self.done: list[int] = []

    def of(self, tree: TokenTree, lengths: list[int], slots: int, capacity: int) -> Tensor | None:
        """The mask of a pass over trees that lie behind the committed slots.

        Args:
            tree: the trees, on the CPU.
            lengths: committed slots of each row.
            slots: of the result: the longest row and its tree.
            capacity: slots to have room for; at least ``slots``.

        Returns:
            ``[B, N, slots]``, valid until the next call; None where native code can not write it.
        """
        batch, width = tree.tokens.shape
        if not batch or not is_plain(tree):
            return None
        cells = self.cells
        if cells is None or cells.shape[0] != batch or cells.shape[1] < width or cells.shape[2] < slots:
            cells = self._start(batch, width, max(slots, capacity))
        native.step.write_step_mask(
            tree.parents.data_ptr(),
            tree.num_nodes.data_ptr(),
            batch,
            width,
            cells.data_ptr(),
            cells.shape,
            self.done,
            lengths,
            slots,
        )
        self.done = list(lengths)
        return cells[:, :width, :slots]

    def _start(self, batch: int, width: int, capacity: int) -> Tensor:
        self.cells = torch.zeros((batch, width, capacity), dtype=torch.bool)
        self.done = [0] * batch
        if self.valid is not None:
            # The prompt is committed up to its root; the root's own slot is written with the trees.
            known = self.valid.shape[1] - 1
            self.cells[:, :, :known] = self.valid[:, None, :known]
            self.done = [known] * batch
        return self.cells
