"""Definition of ``tree_attention``: a few tree nodes attend to the KV cache and to their own ancestors."""

from __future__ import annotations

import torch
from torch import Tensor


def tree_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    ancestors: Tensor,
    k_tree: Tensor | None = None,
    v_tree: Tensor | None = None,
    starts: Tensor | None = None,
    scale: float | None = None,
    tail: int | None = None,
) -> Tensor:
    """Softmax attention of node i of row b over the slots it sees, in float32 or wider.

    It sees slots ``starts[b] <= s < lengths[b]`` of the cache and tail slot j where bit j of
    ``ancestors[b, i]`` is set. Tail slot j is row j of ``k_tree``, or slot ``lengths[b] + j`` of the cache.
    A node that sees nothing gets zeros. Shapes are those of :func:`specfuse.ops.tree_attention`.
    """
    B, H, N, D = q.shape
    G = k_cache.shape[1]
    scale = D**-0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    tail = tail if tail is not None else N if k_tree is None else k_tree.shape[2]
    for b in range(B):
        first, end = 0 if starts is None else int(starts[b]), int(lengths[b])
        for i in range(N):
            nodes = [j for j in range(tail) if int(ancestors[b, i]) >> j & 1]
            behind = [end + j for j in nodes]
            k = k_cache[b, :, behind] if k_tree is None else k_tree[b, :, nodes]
            v = v_cache[b, :, behind] if v_tree is None else v_tree[b, :, nodes]
            k = torch.cat([k_cache[b, :, first:end], k], dim=1).to(wide)  # [G, keys, D]
            v = torch.cat([v_cache[b, :, first:end], v], dim=1).to(wide)
            if k.shape[1]:
                query = q[b, :, i].reshape(G, H // G, D).to(wide)
                weights = torch.softmax(scale * query @ k.mT, dim=-1)
                out[b, :, i] = (weights @ v).reshape(H, D).to(q.dtype)
    return out
