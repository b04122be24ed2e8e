"""``tree_attention`` in PyTorch: a dense mask, or flash attention for the prefix merged with the tree's part.

Query heads that share a kv head are packed into rows, ``[B, H, N, D] -> [B, G, H/G * N, D]``: every row sees
the whole prefix, so nothing is repeated and no mask is needed there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TreeInputs(NamedTuple):
    """Arguments of :func:`specfuse.ops.tree_attention`, checked and with every default filled in."""

    q: Tensor  # [B, H, N, D]
    k_cache: Tensor  # [B, G, Smax, D]
    v_cache: Tensor
    lengths: Tensor  # [B] int64
    ancestors: Tensor  # [B, N] int64
    k_tree: Tensor | None  # [B, G, T, D]
    v_tree: Tensor | None
    starts: Tensor | None  # [B] int64
    scale: float
    tail: int  # T
    longest: int  # at least every length

    def row(self, b: int) -> TreeInputs:
        """Row b alone."""
        values = (v[b : b + 1] if isinstance(v, Tensor) else v for v in self)
        return type(self)(*values)  # type: ignore[arg-type]

    def wide(self) -> torch.dtype:
        """What partial results are kept in."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def sees(self) -> Tensor:
        """``[B, N, T]`` bool: the ancestor bits, unpacked."""
        return (self.ancestors[:, :, None] >> torch.arange(self.tail, device=self.q.device) & 1).bool()

    def packed_query(self) -> Tensor:
        """``[B, G, H/G * N, D]``, D contiguous: flash attention reads it so, whatever the strides say."""
        B, H, N, D = self.q.shape
        G = self.k_cache.shape[1]
        rows = self.q.reshape(B, G, H // G * N, D)
        return rows if rows.stride(3) == 1 else rows.contiguous()

    def bounds(self) -> tuple[list[int], list[int]]:
        """First and end slot of every row's prefix, on the host: waits for a GPU."""
        ends = self.lengths.tolist()
        starts = [0] * len(ends) if self.starts is None else self.starts.tolist()
        for b, (first, end) in enumerate(zip(starts, ends, strict=True)):
            used = end + (self.tail if self.k_tree is None else 0)
            if not 0 <= first <= end or used > self.k_cache.shape[2] or end > self.longest:
                raise ValueError(
                    f"lengths[{b}] = {end} does not fit: starts {first}, longest {self.longest}, "
                    f"{self.tail} tree slots, {self.k_cache.shape[2]} slots in the cache"
                )
        return starts, ends


def sdpa(x: TreeInputs) -> Tensor:
    """``scaled_dot_product_attention`` under a dense mask; rows of one length in one call."""
    if not x.q.shape[0]:
        return torch.zeros_like(x.q)
    if x.q.device.type != "cpu":
        return _sdpa_masked(x)
    starts, ends = x.bounds()
    if len({*starts}) == 1 and len({*ends}) == 1:
        return _sdpa_exact(x, starts[0], ends[0])
    rows = (_sdpa_exact(x.row(b), starts[b], ends[b]) for b in range(len(ends)))
    return torch.cat(list(rows))


def _sdpa_exact(x: TreeInputs, first: int, end: int) -> Tensor:
    """Rows with the same bounds, without touching a slot outside them."""
    k, v = _with_tail(x, first, end)
    sees = x.sees()
    seen = sees.any(dim=1)
    if not bool(seen.all()):
        # Slots that no node sees may hold anything, and 0 * NaN is NaN.
        k, v = k.clone(), v.clone()
        unseen = ~seen[:, None, :, None]
        for t in (k, v):
            t[:, :, end - first :].masked_fill_(unseen, 0)
    mask = torch.cat([sees.new_ones(*sees.shape[:2], end - first), sees], dim=2)
    return _masked_attention(x, k, v, mask, all_see=end > first)


def _sdpa_masked(x: TreeInputs) -> Tensor:
    """Any rows without waiting for the device: the mask spans the longest row, unseen slots are cleared."""
    span = x.longest + (x.tail if x.k_tree is None else 0)
    slot = torch.arange(min(span, x.k_cache.shape[2]), device=x.q.device)[None]
    mask = slot < x.lengths[:, None]
    if x.starts is not None:
        mask &= slot >= x.starts[:, None]
    mask = mask[:, None].expand(-1, x.q.shape[2], -1)
    sees = x.sees()
    if x.k_tree is None:
        node = slot - x.lengths[:, None]
        inside = ((node >= 0) & (node < x.tail))[:, None]
        at = node.clamp(0, x.tail - 1)[:, None].expand(-1, x.q.shape[2], -1)
        mask = mask | (inside & sees.gather(2, at))
        k, v = x.k_cache[:, :, : slot.shape[1]], x.v_cache[:, :, : slot.shape[1]]
    else:
        mask = torch.cat([mask, sees], dim=2)
        k, v = _with_tail(x, 0, slot.shape[1])
    unseen = ~mask.any(dim=1)[:, None, :, None]
    return _masked_attention(x, k.masked_fill(unseen, 0), v.masked_fill(unseen, 0), mask)


def _with_tail(x: TreeInputs, first: int, end: int) -> tuple[Tensor, Tensor]:
    if x.k_tree is None or x.v_tree is None:
        return x.k_cache[:, :, first : end + x.tail], x.v_cache[:, :, first : end + x.tail]
    k = torch.cat([x.k_cache[:, :, first:end], x.k_tree], dim=2)
    return k, torch.cat([x.v_cache[:, :, first:end], x.v_tree], dim=2)


def _masked_attention(x: TreeInputs, k: Tensor, v: Tensor, mask: Tensor, all_see: bool = False) -> Tensor:
    q = x.packed_query()
    rows = mask[:, None].repeat(1, 1, q.shape[2] // mask.shape[1], 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=rows, scale=x.scale)
    if not all_see:
        out = out.masked_fill(~rows.any(dim=3, keepdim=True), 0)
    return out.reshape(x.q.shape)


def prefix_and_tree(x: TreeInputs, flash: bool) -> Tensor:
    """Flash attention over the prefix, eager over the tree, merged by their log-sum-exps.

    Args:
        x: the inputs.
        flash: the flash-attn package (ragged rows in one call) rather than PyTorch's own flash attention (one
            call per row where rows differ; waits for a GPU to learn the lengths).
    """
    if not x.q.shape[0]:
        return torch.zeros_like(x.q)
    prefix, lse = _flash_package(x) if flash else _flash_torch(x)
    tree, tree_lse = _tree_part(x)
    return merge_parts(prefix, lse, tree, tree_lse).to(x.q.dtype).reshape(x.q.shape)


def merge_parts(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> Tensor:
    """Attention over two sets of keys from that over each, ``[..., D]``, and their log-sum-exps ``[...]``."""
    top = torch.maximum(first_lse, second_lse).clamp(min=torch.finfo(first_lse.dtype).min)
    parts = [(first_lse - top).exp()[..., None], (second_lse - top).exp()[..., None]]
    total = parts[0] + parts[1]
    return (parts[0] * first + parts[1] * second) / total.masked_fill(total == 0, 1)


def _flash_torch(x: TreeInputs) -> tuple[Tensor, Tensor]:
    """Prefix output ``[B, G, H/G * N, D]`` and log-sum-exp ``[B, G, H/G * N]`` by aten's flash attention."""
    starts, ends = x.bounds()
    if len({*starts}) > 1 or len({*ends}) > 1:
        rows = [_flash_torch(x.row(b)) for b in range(len(ends))]
        return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])
    q = x.packed_query()
    k, v = x.k_cache[:, :, starts[0] : ends[0]], x.v_cache[:, :, starts[0] : ends[0]]
    if starts[0] == ends[0]:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=x.wide())
    if q.device.type == "cpu":
        attend: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = attend(q, k, v, scale=x.scale)
    else:
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = attend(q, k, v, scale=x.scale)[:2]
    return out, lse[..., : q.shape[2]].to(x.wide())


def _flash_package(x: TreeInputs) -> tuple[Tensor, Tensor]:
    """The same by flash_attn_with_kvcache, which takes ragged lengths and left padding as tensors."""
    attend = load_flash_package()
    options = {} if x.starts is None else {"cache_leftpad": x.starts.to(torch.int32)}
    out, lse = attend(
        x.packed_query().transpose(1, 2),
        x.k_cache.transpose(1, 2),
        x.v_cache.transpose(1, 2),
        cache_seqlens=x.lengths.to(torch.int32),
        softmax_scale=x.scale,
        return_softmax_lse=True,
        **options,
    )[:2]
    first = 0 if x.starts is None else x.starts
    empty = (x.lengths <= first)[:, None, None]
    return out.transpose(1, 2).masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)


def load_flash_package() -> Any:
    """``flash_attn_with_kvcache`` of flash-attn 2.

    Raises:
        ImportError: it is not installed or does not import; finding a package of that name is not enough,
            since flash-attn 4 installs one without this function.
    """
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError as error:
        raise ImportError(
            f"implementation='flash' needs flash-attn 2 (pip install flash-attn): {error}"
        ) from error
    return flash_attn_with_kvcache


def _tree_part(x: TreeInputs) -> tuple[Tensor, Tensor]:
    """The tree's own output and log-sum-exp, in float32 or wider."""
    k, v = (t.to(x.wide()) for t in _tail_rows(x))
    sees = x.sees()
    unseen = ~sees.any(dim=1)[:, None, :, None]
    k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    q = x.packed_query().to(x.wide())
    mask = sees[:, None].repeat(1, 1, q.shape[2] // sees.shape[1], 1)
    scores = (x.scale * q @ k.mT).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(dim=3)
    weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp()
    return weights @ v, lse


def _tail_rows(x: TreeInputs) -> tuple[Tensor, Tensor]:
    """Keys and values of the tree, ``[B, G, T, D]``."""
    if x.k_tree is not None and x.v_tree is not None:
        return x.k_tree, x.v_tree
    slots = x.lengths[:, None] + torch.arange(x.tail, device=x.q.device)
    at = slots[:, None, :, None].expand(-1, x.k_cache.shape[1], -1, x.k_cache.shape[3])
    return x.k_cache.gather(2, at), x.v_cache.gather(2, at)
