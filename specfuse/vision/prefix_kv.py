"""KV of a prompt prefix outside any cache, and how it gets out of one cache and into another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from specfuse.vision.prefix import RowPrefix

LayerKV = dict[int, tuple[Tensor, Tensor]]
"""Layer index -> keys and values, each [1, G, P, D]."""

UpdateHook = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class PrefixKV:
    """Keys and values of one visual prefix of P tokens.

    `layers[i] = (k, v)`, each [1, G, P, D], never written to.
    """

    def __init__(self, layers: LayerKV):
        self.layers = layers
        self.nbytes = sum(t.numel() * t.element_size() for pair in layers.values() for t in pair)
        devices = {t.device for pair in layers.values() for t in pair if t.is_cuda}
        self._ready = [torch.cuda.current_stream(device).record_event() for device in devices]

    def acquire(self) -> LayerKV:
        """The layers, safe to read on the current CUDA streams even where another stream wrote them."""
        for event in self._ready:
            torch.cuda.current_stream(event.device).wait_event(event)
        for pair in self.layers.values():
            for tensor in pair:
                if tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return self.layers


def gather(
    layers: list[LayerKV | None],
    rows: list[RowPrefix],
    layer: int,
    which: int,
    begin: int,
) -> Tensor:
    """Keys or values [B, G, begin, D] of one layer: each row's prefix in its slots, zeros at padding."""
    like = next(entry[layer][which] for entry in layers if entry is not None)
    if len(rows) == 1 and rows[0].first == 0:
        return like
    out = like.new_zeros(len(rows), like.shape[1], begin, like.shape[3])
    for i, (row, entry) in enumerate(zip(rows, layers, strict=True)):
        if entry is not None and row.first < begin:
            out[i, :, row.first :] = entry[layer][which][0, :, : begin - row.first]
    return out


def append(past: Cache, layer: int, k: Tensor, v: Tensor) -> None:
    """Writes `k`, `v` [B, G, P, D] behind what `past` holds in one layer."""
    past.update(k, v, layer)
    # A cache that keeps the very tensors it is given might write later tokens into them.
    stored: Any = past.layers[layer]
    for name, given in (("keys", k), ("values", v)):
        if getattr(stored, name).untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
            setattr(stored, name, given.clone())


@contextmanager
def on_update(past: Cache, hook: UpdateHook) -> Iterator[None]:
    """Lets `hook` see, and replace, the keys and values [B, G, q, D] of every update inside the block."""
    update = past.update

    def hooked(key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return update(*hook(key_states, value_states, layer_idx), layer_idx, *args, **kwargs)

    past.update = hooked  # type: ignore[method-assign]
    try:
        yield
    finally:
        del past.update


def recorder(parts: list[tuple[int, int]]) -> tuple[list[LayerKV], UpdateHook]:
    """An `on_update` hook that copies the slots `parts[b] = (first, end)` of row b, and where it puts them.

    Nothing is copied of a row whose part is empty.
    """
    kept: list[LayerKV] = [{} for _ in parts]

    def keep(k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        for row, (first, end) in enumerate(parts):
            if end > first:
                part = (slice(row, row + 1), slice(None), slice(first, end))
                kept[row][layer] = (k[part].clone(), v[part].clone())
        return k, v

    return kept, keep
