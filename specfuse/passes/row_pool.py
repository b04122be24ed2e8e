"""A batch whose rows come and go: one preallocated cache, a prompt's KV is put in when a row starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specfuse.hf.kv_layers import layers_with_kv
from specfuse.passes.kv_cache import TreeCache, TreeCacheLayer
from specfuse.passes.shared_prefix import SharedPrefix, SharedPrefixMask
from specfuse.passes.tree_forward import TreeForward
from specfuse.passes.tree_layout import node_positions
from specfuse.tree import TokenTree

_SLOTS = 16  # capacities are multiples of this


class _PooledLayer(TreeCacheLayer):
    """A layer with room for more rows than run: ``keys`` and ``values`` are the first rows of ``room``."""

    room: tuple[Tensor, Tensor]  # [rows, G, capacity, D] each

    def reserve(self, like: Tensor, rows: int, capacity: int, needed: int) -> None:
        """Room for that many rows of ``capacity`` slots, or of the ``needed`` ones where memory is short."""
        if not self.is_initialized:
            self.dtype, self.device = like.dtype, like.device
            nothing = like[:1, :, :0].expand(rows, -1, -1, -1)
            self.room = nothing, nothing
            self.is_initialized = True
        held = self.room[0].shape[2]
        if held < capacity:
            # Requests differ in length: the next one that is a little longer should find room.
            roomy = max(capacity, held + held // 4)
            self._grow(max(needed, held), -(-roomy // _SLOTS) * _SLOTS)

    def show(self, rows: int) -> None:
        """Lets passes see the first rows."""
        self.keys, self.values = (buffer[:rows] for buffer in self.room)

    def _move_to(self, capacity: int) -> None:
        grown = [self._allocate(old, capacity) for old in self.room]
        for new, old in zip(grown, self.room, strict=True):
            new[:, :, : old.shape[2]] = old
        self.room = grown[0], grown[1]
        self.show(len(self.cache.lengths))


class _PooledCache(TreeCache):
    """The cache of the running rows; knows which layer was written last."""

    layer_now = -1

    def __init__(self, num_layers: int):
        super().__init__(num_layers, 0, 0)
        self.layers = [_PooledLayer(self) for _ in range(num_layers)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        self.layer_now = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class RowPool(TreeForward):
    """A TreeForward with 0 to ``max_rows`` rows; only running rows are computed, whoever left.

    Args:
        model: as for TreeForward.
        max_rows: rows there is room for.
        prefix: KV that begins every row and is kept once, where :meth:`shares_prefix`.

    Raises:
        ValueError: a prefix, for a model that can not share it; else as for TreeForward.
    """

    def __init__(self, model: PreTrainedModel, max_rows: int, prefix: SharedPrefix | None = None):
        super().__init__(model, 0, 0)
        self.max_rows, self.prefix = max_rows, prefix
        self.cache: _PooledCache = _PooledCache(layers_with_kv(self.config))
        self.last_ids: list[int] = []
        if prefix is not None:
            if not self.shares_prefix:
                raise ValueError("prefix: only sdpa without sliding windows can share one between rows")
            self.takes_tree = False

    @property
    def shares_prefix(self) -> bool:
        """Whether the model attends in a way that a shared prefix can be brought into."""
        # A layer without keys of its own would not know which of the prefix to read.
        shared_kv = layers_with_kv(self.config) != self.config.num_hidden_layers
        return self.layout.implementation != "eager" and not self.layout.windowed and not shared_kv

    def join(self, one: TreeForward, root_id: int) -> None:
        """Adds a last row: what a prefilled model of one row holds, its padding left out.

        Args:
            one: committed up to its root.
            root_id: position id of that root.

        Raises:
            ValueError: a mask with holes, for a model with sliding windows.
        """
        lengths, length = self.cache.lengths, one.cache.lengths[0]
        shared = 0 if self.prefix is None else self.prefix.length
        kept = None
        if one.valid is not None:
            if one.starts is None and self.layout.windowed:
                raise ValueError("attention_mask has holes, which sliding windows do not take in a stream")
            valid = one.valid[0, :length]
            answer = torch.arange(len(valid), length, device=valid.device)
            kept = torch.cat([valid.nonzero()[:, 0], answer])
        count = (length if kept is None else len(kept)) - shared
        row = len(lengths)
        for layer, other in zip(self.cache.layers, one.cache.layers, strict=True):
            layer.reserve(other.keys, self.max_rows, one.cache.capacity - shared, count + 1)
        for layer, other in zip(self.cache.layers, one.cache.layers, strict=True):
            for room, given in zip(layer.room, (other.keys, other.values), strict=True):
                slots = (
                    given[0, :, shared:length] if kept is None else given[0].index_select(1, kept[shared:])
                )
                room[row, :, :count] = slots
        self.last_ids.append(one.max_position if one.max_position is not None else 2**62)
        offset = torch.full((1, 1), shared + count - root_id, dtype=torch.int64, device=self.device)
        self._slot_offset = torch.cat([self._slot_offset, offset])
        self._resize([*lengths, count])

    def leave(self, row: int, wipe: bool = False) -> None:
        """Takes a row out; the last row takes its place.

        Args:
            row: which.
            wipe: its KV may hold NaN, which even masked slots must not.
        """
        lengths = list(self.cache.lengths)
        last = len(lengths) - 1
        for layer in self.cache.layers:
            for room in layer.room:
                if wipe:
                    room[row] = 0
                if row != last:
                    room[row, :, : lengths[last]] = room[last, :, : lengths[last]]
        order = [*range(row), *([last] if row != last else []), *range(row + 1, last)]
        self.last_ids = [self.last_ids[i] for i in order]
        self._slot_offset = self._slot_offset[order]
        self._resize([lengths[i] for i in order])

    @property
    def kv_bytes(self) -> int:
        """Memory of all keys and values, the shared prefix counted once."""
        rooms = (t for layer in self.cache.layers if layer.is_initialized for t in layer.room)
        own = sum(t.numel() * t.element_size() for t in rooms)
        return own + (0 if self.prefix is None else self.prefix.kv_bytes)

    def forward_tree(self, tree: TokenTree, root_positions: Tensor) -> Tensor:
        """Runs a whole tree per row, root included; logits ``[B, N, V]``."""
        if self.prefix is None:
            return super().forward_tree(tree, root_positions)
        positions = node_positions(tree, root_positions, self.max_position)
        dense = self._kept_mask(tree)
        if dense is None:
            dense = self._step_mask(tree.ancestor_mask(), positions)
        mask = SharedPrefixMask.wrap(dense, self.prefix, self.cache)
        logits = self._run(tree.tokens, positions, mask)
        mask.check_read(len(self.cache.layers))
        return logits

    def _resize(self, lengths: list[int]) -> None:
        self.cache.set_lengths(lengths)
        for layer in self.cache.layers:
            layer.show(len(lengths))
        self.pads = [0] * len(lengths)
        self.max_position = max(self.last_ids, default=None)
        self._mask = None
