"""Attention of many rows to one prefix that is stored once, merged with each row's own slots.

Softmax over two sets of keys is the mean of the softmax over each, weighted by their sums of exponentials.
So all rows' queries meet the prefix in one matrix product, and their own slots row by row.

Source: Juravsky et al., "Hydragen", 2024; the cascade inference of FlashInfer, Ye et al., 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class SharedPrefix:
    """Keys and values of a prefix of P tokens.

    Args:
        layers: per layer, keys and values, each ``[1, G, P, D]``; never written to.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]):
        self.layers = list(layers)
        self.length = self.layers[0][0].shape[2]
        self.kv_bytes = sum(t.numel() * t.element_size() for pair in self.layers for t in pair)


class SharedPrefixMask(Tensor):
    """The dense mask ``[B, 1, N, slots]`` of the rows' own slots, which brings the prefix with it.

    ``scaled_dot_product_attention`` adds the prefix where it meets this mask; a model that attends in another
    way is found out by :meth:`check_read`.
    """

    prefix: SharedPrefix
    cache: Any
    readers: set[int]
    sums: Tensor | None

    @staticmethod
    def wrap(mask: Tensor, prefix: SharedPrefix, cache: Any) -> SharedPrefixMask:
        """``mask`` with the prefix; ``cache.layer_now`` says which layer attends."""
        wrapped = mask.as_subclass(SharedPrefixMask)
        wrapped.prefix, wrapped.cache, wrapped.readers = prefix, cache, set()
        wrapped.sums = None
        return wrapped

    def additive(self, dtype: torch.dtype) -> Tensor:
        """0 where a node sees a slot, else so low that nothing is left of it; made once for all layers.

        Not -inf: a padding node sees nothing, and its output must not be NaN.
        """
        if self.sums is None:
            seen = self.as_subclass(Tensor)
            wide = torch.promote_types(dtype, torch.float32)
            low = torch.finfo(torch.float32).min / 4
            self.sums = torch.zeros(seen.shape, dtype=wide, device=seen.device).masked_fill_(~seen, low)
        return self.sums

    def check_read(self, layers: int) -> None:
        """Raises RuntimeError unless every layer has attended to the prefix."""
        if len(self.readers) != layers:
            raise RuntimeError(
                f"{len(self.readers)} of {layers} layers attended to the shared prefix: the model does not "
                "hand its mask to scaled_dot_product_attention as it is"
            )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        # Whatever is made of the mask (a slice, a copy) is an ordinary tensor.
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention and isinstance(kwargs.get("attn_mask"), cls):
                return _attend(*args, **kwargs)
            return func(*args, **kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: SharedPrefixMask,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    layer = attn_mask.cache.layer_now
    attn_mask.readers.add(layer)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    keys, values = attn_mask.prefix.layers[layer]
    prefix, prefix_lse = attend_to_prefix(query, keys, values, scale)
    own, own_lse = attend_with_mask(query, key, value, attn_mask.additive(query.dtype), scale)
    # exp(a) / (exp(a) + exp(b)) is the share of the prefix.
    share = (prefix_lse - own_lse).sigmoid()[..., None]
    return torch.lerp(own, prefix, share).to(query.dtype)


def attend_to_prefix(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query sees all of one prefix.

    Args:
        query: ``[B, H, N, D]``.
        keys, values: ``[1, G, P, D]``, H a multiple of G.
        scale: factor of the scores.

    Returns:
        out ``[B, H, N, D]`` and log-sum-exp ``[B, H, N]``, in float32 or wider.
    """
    B, H, N, D = query.shape
    G = keys.shape[1]
    # Rows and the query heads of a kv head side by side: one product per kv head.
    packed = query.reshape(B, G, H // G, N, D).permute(1, 2, 0, 3, 4).reshape(1, G, H // G * B * N, D)
    out, lse = _attention_and_lse(packed, keys, values, None, scale)
    out = out.reshape(G, H // G, B, N, D).permute(2, 0, 1, 3, 4).reshape(B, H, N, D)
    return out, lse.reshape(G, H // G, B, N).permute(2, 0, 1, 3).reshape(B, H, N)


def attend_with_mask(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Each row sees its own slots under an additive ``mask [B, 1, N, slots]``; as :func:`attend_to_prefix`.

    ``key`` and ``value`` are ``[B, G, slots, D]``, or repeated to H heads already.
    """
    B, H, N, D = query.shape
    G = key.shape[1]
    rows = mask if H == G else mask.repeat(1, 1, H // G, 1)
    out, lse = _attention_and_lse(query.reshape(B, G, H // G * N, D), key, value, rows, scale)
    return out.reshape(B, H, N, D), lse.reshape(B, H, N)


def _attention_and_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    half = query.dtype in (torch.float16, torch.bfloat16)
    flash: Any
    if query.device.type == "cpu" and not (half and mask is not None):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(query, key, value, attn_mask=mask, scale=scale)
    elif query.device.type == "cuda" and half and mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = flash(query, key, value, scale=scale)[:2]
        lse = lse[..., : query.shape[2]]
    else:
        scores = scale * query.to(wide) @ key.to(wide).mT
        scores = scores if mask is None else scores + mask
        lse = scores.logsumexp(dim=-1)
        out = (scores - lse[..., None]).exp() @ value.to(wide)
    return out.to(wide), lse.to(wide)
