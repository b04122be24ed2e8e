"""The preallocated KV cache of a speculative loop: prefix and tree share one buffer, nothing is re-copied.

Rows are ragged: row b holds ``lengths[b]`` committed slots; the nodes of the current tree lie right behind
them. Committing moves the accepted path to the front of those nodes (``compact_kv``) and advances
``lengths``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from specfuse.ops import native
from specfuse.ops.compact_kv import compact_kv
from specfuse.passes.out_of_memory import is_out_of_memory


class TreeCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[B, G, capacity, D]``; ``update`` writes behind the committed slots."""

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: TreeCache):
        super().__init__()
        self.cache = cache
        self.pending = 0  # slots written behind the committed ones since the last commit

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._allocate(key_states, self.cache.capacity)
        self.values = self._allocate(value_states, self.cache.capacity)
        self.is_initialized = True

    @staticmethod
    def _allocate(like: Tensor, capacity: int) -> Tensor:
        # Zeros, not empty: a masked slot still enters attention as 0 * value, and 0 * NaN is NaN.
        batch, heads, _, dim = like.shape
        return torch.zeros((batch, heads, capacity, dim), dtype=like.dtype, device=like.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes ``[B, G, q, D]`` new rows; returns the keys and values up to the longest row."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cache.written += key_states.shape[-2]
        if self.cache.static_slots is not None:
            # Addresses and shapes that never change, so that the pass can be captured in a graph.
            row, slot = self.cache.static_slots
            self.keys[row, :, slot] = key_states.transpose(1, 2)
            self.values[row, :, slot] = value_states.transpose(1, 2)
            return self.keys, self.values
        count = key_states.shape[-2]
        end = self.cache.longest + self.pending + count
        if end > self.keys.shape[2]:
            self._grow(end)
        if not self.cache.ragged:
            self.keys.narrow(2, end - count, count).copy_(key_states)
            self.values.narrow(2, end - count, count).copy_(value_states)
        elif not self._write_rows(key_states, value_states):
            row, slot = self.cache.slots(self.pending, count)
            self.keys[row, :, slot] = key_states.transpose(1, 2)
            self.values[row, :, slot] = value_states.transpose(1, 2)
        self.pending += count
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def _write_rows(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Writes ragged rows on the CPU by memcpy; False where PyTorch has to do it."""
        lengths, new = self.cache.lengths, (key_states, value_states)
        batch, heads, count, dim = key_states.shape
        if native.step is None or not key_states.is_cpu or batch != len(lengths):
            return False
        copies, strides = [], []
        for states, buffer in zip(new, (self.keys, self.values), strict=True):
            b, g, s, d = states.stride()
            odd = (d != 1 and dim > 1) or states.shape != key_states.shape
            if odd or states.dtype is not buffer.dtype:
                return False
            copies.append((states.data_ptr(), buffer.data_ptr()))
            size = states.element_size()
            strides.append([step * size for step in (b, g, s, *buffer.stride()[:3])])
        starts = [length + self.pending for length in lengths]
        native.step.write_rows(copies, strides, (batch, heads, count, dim * size), starts)
        return True

    def _grow(self, needed: int, roomy: int = 0) -> None:
        # Doubling keeps the copies rare when the answer outgrows what was reserved for it.
        roomy = roomy or max(self.cache.capacity, 2 * self.keys.shape[2], needed)
        try:
            self._move_to(roomy)
        except (RuntimeError, MemoryError) as error:
            if roomy == needed or not is_out_of_memory(error):
                raise
            self._move_to(needed)
        self.cache.capacity = max(self.cache.capacity, self.keys.shape[2])

    def _move_to(self, capacity: int) -> None:
        grown = [self._allocate(old, capacity) for old in (self.keys, self.values)]
        for new, old in zip(grown, (self.keys, self.values), strict=True):
            new[:, :, : old.shape[2]] = old
        self.keys, self.values = grown

    def get_seq_length(self) -> int:
        return self.cache.longest + self.pending

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.pending = 0


class TreeCache(Cache):
    """KV of all layers for B ragged rows.

    Args:
        num_layers: decoder layers of the model.
        batch_size: B.
        capacity: slots reserved per row; grows by doubling when a row outgrows it.

    Attributes:
        static_slots: index tensors ``[B, 1]`` and ``[B, q]`` where a pass writes instead of behind the
            committed slots; it is then given all slots of the buffers. None: as usual.
        path_kept: the last tree's accepted path lies behind the prefix already.
    """

    def __init__(self, num_layers: int, batch_size: int, capacity: int):
        self.capacity = capacity
        self.lengths = [0] * batch_size
        self.longest = 0
        self.ragged = False  # rows start at different slots
        self.static_slots: tuple[Tensor, Tensor] | None = None
        self.path_kept = False
        self.written = 0  # slots written since a pass set it to 0, summed over layers
        self._slots: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._lengths_on_device: Tensor | None = None
        super().__init__(layers=[TreeCacheLayer(self) for _ in range(num_layers)])

    @property
    def pending(self) -> int:
        """Slots written since the last commit (the same in every layer once a pass is over)."""
        return self.layers[-1].pending

    def slots(self, pending: int, count: int) -> tuple[Tensor, Tensor]:
        """Index tensors ``[B, 1]`` and ``[B, count]`` that address ragged rows."""
        index = self._slots.get((pending, count))
        if index is None:
            device = self.layers[0].device
            starts = torch.tensor(self.lengths, device=device)[:, None] + pending
            rows = torch.arange(len(self.lengths), device=device)[:, None]
            index = self._slots[pending, count] = (rows, starts + torch.arange(count, device=device))
        return index

    def device_lengths(self, device: torch.device) -> Tensor:
        """``[B]`` int64 committed slots of each row, copied to the device once per commit."""
        if self._lengths_on_device is None:
            self._lengths_on_device = torch.tensor(self.lengths, device=device)
        return self._lengths_on_device

    def set_lengths(self, lengths: list[int]) -> None:
        """Declares how many slots of each row are committed; what lies behind them is forgotten."""
        self.lengths = list(lengths)
        self.longest = max(self.lengths, default=0)
        self.ragged = min(self.lengths, default=0) != self.longest
        self._slots.clear()
        self._lengths_on_device = None
        self.path_kept = False
        for layer in self.layers:
            layer.pending = 0

    def keep_path(self, path: Tensor, length: Tensor, root_slots: list[int]) -> None:
        """Moves each row's accepted nodes behind its root: node path[b, i] to slot root_slots[b] + i."""
        if self.path_kept:
            return
        if not all(layer.is_initialized for layer in self.layers):
            raise RuntimeError(
                "keep_path: a layer of the KV cache was never written, its path can not be kept"
            )
        start = torch.tensor(root_slots, dtype=torch.int64, device=path.device)
        compact_kv(self.buffers(), path, length, start)

    def keep_rows(self, rows: list[int]) -> None:
        """Leaves the rows named, in ascending order, and lets go of the others; nothing is allocated."""
        lengths = [self.lengths[row] for row in rows]
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                    if place != row:
                        buffer[place, :, :length] = buffer[row, :, :length]
            layer.keys, layer.values = layer.keys[: len(rows)], layer.values[: len(rows)]
        self.set_lengths(lengths)

    def buffers(self) -> list[Tensor]:
        """Keys and values of every layer, ``[B, G, capacity, D]`` each; none before the first pass."""
        if not all(layer.is_initialized for layer in self.layers):
            return []
        return [buffer for layer in self.layers for buffer in (layer.keys, layer.values)]

    def adopt(self, buffers: list[Tensor]) -> None:
        """Takes another cache's buffers of the same batch and model, whatever they hold."""
        self.capacity = buffers[0].shape[2]
        for layer, keys, values in zip(self.layers, buffers[::2], buffers[1::2], strict=True):
            layer.keys, layer.values = keys, values
            layer.dtype, layer.device = keys.dtype, keys.device
            layer.is_initialized = True

    def load(self, past: Cache, window: int | None = None) -> int:
        """Copies another cache's rows to the front; returns how many slots that filled.

        Layers with a window may hold the last ``window - 1`` slots alone; zeros stand for those before.
        """
        filled = past.get_seq_length()
        for index, (layer, other) in enumerate(zip(self.layers, past.layers, strict=True)):
            held = min(filled, other.keys.shape[2])
            if held < (filled if window is None else min(filled, window - 1)):
                raise ValueError(
                    f"past_key_values holds {held} of its {filled} tokens in layer {index}, which needs "
                    f"{'all' if window is None else f'the last {window - 1}'} of them"
                )
            kept = [t[:, :, :held] for t in (other.keys, other.values)]
            if held < filled:
                kept = [torch.nn.functional.pad(t, (0, 0, filled - held, 0)) for t in kept]
            layer.update(*kept)
        self.set_lengths([filled] * len(self.lengths))
        return filled

    def to_dynamic(self, length: int, into: Cache | None = None) -> DynamicCache:
        """The first ``length`` slots as the DynamicCache that ``model.generate`` would return.

        Args:
            length: slots of every row.
            into: a cache that is filled and returned where it is a DynamicCache that keeps all it is given.
        """
        dynamic = DynamicCache()
        if isinstance(into, DynamicCache) and all(type(layer) is DynamicLayer for layer in into.layers):
            dynamic = into
        for index, layer in enumerate(self.layers):
            keys, values = (t[:, :, :length].clone() for t in (layer.keys, layer.values))
            held: Any = dynamic.layers[index] if index < len(dynamic.layers) else None
            if held is not None and held.is_initialized:
                held.keys, held.values = keys, values
            else:
                dynamic.update(keys, values, index)
        return dynamic
