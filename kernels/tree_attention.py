"""Triton ``tree_attention``: the nodes of a draft tree attend to a long prefix and to their ancestors.

Idea. The H/G query heads of a kv head and the N nodes are packed into M = H/G * N rows of one matrix product,
so that a tile of keys and values serves all of them. The prefix of a row, ``starts[b] .. lengths[b]``, is
divided evenly over SPLITS programs (flash-decoding). The division is made on the device from the row's own
length, so ragged rows stay balanced, nothing waits for the host and a captured graph stays valid as lengths
grow. The last split adds the tree: one tile masked by the packed ancestor bits. With more than one split each
writes a partial result and its log-sum-exp, and ``tree_attention_merge_kernel`` weighs them; there are no
counters to clear.

What must move: K and V of every valid slot once, q and the output once. M rows beyond BLOCK_M make several
row tiles; they run side by side and the second finds K and V in L2. Floor on an H200 (4.3 TB/s measured
copy, 790 TFLOP/s bf16), D = 128, 16 bits: 4 * G * S * D bytes a row are 34 MB = 8.0 us at S = 2,091, G = 32
and 76 MB = 17.7 us at S = 4,643. Each byte of KV takes M operations, so memory is the limit up to M = 180;
grouped queries beyond that (H/G = 4, N = 64: M = 256) are limited by the tensor cores. Partial results cost
8 * SPLITS * B * H * N * D bytes, mostly in L2: 8.4 MB at B = 1, H = 32, N = 64 and 4 splits, which is why
there are no more splits than it takes to fill the device.

Limits: N and the tail at most 64, D at most 128 (padded to 64 or 128 in registers, not in memory), float16,
bfloat16, float32; D contiguous. Forward only. Compiled for sm_80 to sm_120 and run under the interpreter; no
GPU has run it yet.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specfuse.kernels import tuned

_LOG2E = 1.4426950408889634

# float32 is there for tests and small models: the largest tiles that do not spill registers.
_FLOAT32 = {
    "BLOCK_M": 16,
    "BLOCK_S": 32,
    "splits": 0,
    "blocks_per_sm": 2,
    "num_warps": 4,
    "num_stages": 1,
}


@triton.jit
def tree_attention_kernel(
    p_q,  # [B, H, N, D]
    p_k,  # [B, G, Smax, D]
    p_v,  # [B, G, Smax, D]
    p_k_tree,  # [B, G, T, D], read where HAS_TREE
    p_v_tree,  # [B, G, T, D]
    p_bits,  # [B, N] int64, contiguous
    p_lengths,  # [B] int64
    p_starts,  # [B] int64, read where HAS_STARTS
    p_out,  # [B, H, N, D]; where PARTIAL [B * G, splits, M, D] float32
    p_lse,  # [B * G, splits, M] float32, written where PARTIAL
    G,
    N,
    M,
    T,
    Smax,
    splits,
    row_tiles,
    scale_log2,
    q_b,
    q_h,
    q_n,
    k_b,
    k_g,
    k_s,
    v_b,
    v_g,
    v_s,
    kt_b,
    kt_g,
    kt_t,
    vt_b,
    vt_g,
    vt_t,
    o_b,
    o_h,
    o_n,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """One row tile of one kv head over one split of its row's prefix; the last split adds the tree."""
    # Row tiles of one kv head are neighbours in the grid: the second finds K and V in L2.
    tile = tl.program_id(0) % row_tiles
    bg = (tl.program_id(0) // row_tiles).to(tl.int64)
    b, g = bg // G, bg % G
    split = tl.program_id(1)

    # Packed rows: (query head of the group, node)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    in_m, in_d = m < M, d < D
    head, node = g * (M // N) + m // N, m % N
    q = tl.load(
        p_q + b * q_b + (head * q_h + node * q_n)[:, None] + d[None, :],
        mask=in_m[:, None] & in_d[None, :],
        other=0.0,
    )

    # This split's share of the prefix
    length = tl.minimum(tl.load(p_lengths + b), Smax).to(tl.int32)
    start = 0
    if HAS_STARTS:
        start = tl.maximum(tl.load(p_starts + b), 0).to(tl.int32)
    # Shares of whole tiles would be uneven; a masked tail of a tile costs no memory traffic.
    share = tl.cdiv(tl.cdiv(tl.maximum(length - start, 0), splits), 16) * 16
    first = start + split * share
    end = tl.minimum(first + share, length)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    s = tl.arange(0, BLOCK_S)
    p_k_bg = p_k + b * k_b + g * k_g
    p_v_bg = p_v + b * v_b + g * v_g

    # Prefix, online softmax in base 2. float32 goes through tf32x3: plain float32 products spill registers
    # and leave the tensor cores idle. Offsets within a tile fit 32 bits, the tile's own may not.
    p_k_tile = p_k_bg + first.to(tl.int64) * k_s
    p_v_tile = p_v_bg + first.to(tl.int64) * v_s
    for s0 in range(first, end, BLOCK_S):
        in_s = s0 + s < end
        in_tile = in_s[:, None] & in_d[None, :]
        k = tl.load(p_k_tile + s[:, None] * k_s + d[None, :], mask=in_tile, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale_log2
        scores = tl.where(in_s[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v = tl.load(p_v_tile + s[:, None] * v_s + d[None, :], mask=in_tile, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="tf32x3")
        top = higher
        p_k_tile += BLOCK_S * k_s
        p_v_tile += BLOCK_S * v_s

    # The tree, masked by ancestor bits; narrow tiles, since the mask takes registers too
    if split == splits - 1:
        bits = tl.load(p_bits + b * N + node, mask=in_m, other=0)
        if HAS_TREE:
            p_k_tile = p_k_tree + b * kt_b + g * kt_g
            p_v_tile = p_v_tree + b * vt_b + g * vt_g
            readable = T
        else:
            p_k_tile = p_k_bg + length.to(tl.int64) * kt_t
            p_v_tile = p_v_bg + length.to(tl.int64) * vt_t
            readable = tl.minimum(T, Smax - length)
        t = tl.arange(0, BLOCK_T)
        for t0 in tl.range(0, readable, BLOCK_T, num_stages=1):
            sees = ((bits[:, None] >> t[None, :].to(tl.int64)) & 1) != 0
            sees = sees & (t0 + t < readable)[None, :]
            # Slots that no node sees may hold anything: 0 * NaN would be NaN, so they are not read.
            in_tile = (tl.max(sees.to(tl.int32), 0) != 0)[:, None] & in_d[None, :]
            k = tl.load(p_k_tile + t[:, None] * kt_t + d[None, :], mask=in_tile, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale_log2
            scores = tl.where(sees, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            # A row that has seen nothing keeps -inf; subtracting that would give NaN.
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - finite[:, None])
            shrink = tl.exp2(top - finite)
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None]
            v = tl.load(p_v_tile + t[:, None] * vt_t + d[None, :], mask=in_tile, other=0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="tf32x3")
            top = higher
            bits = bits >> BLOCK_T
            p_k_tile += BLOCK_T * kt_t
            p_v_tile += BLOCK_T * vt_t

    # Result, zero where nothing was seen
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    acc = acc * (1.0 / total)[:, None]
    if PARTIAL:
        place = (bg * splits + split) * M + m
        tl.store(p_lse + place, tl.where(some, top + tl.log2(total), float("-inf")), mask=in_m)
        # The merge skips parts whose log-sum-exp is -inf, so they need no values.
        tl.store(
            p_out + place[:, None] * D + d[None, :],
            acc,
            mask=(in_m & some)[:, None] & in_d[None, :],
        )
    else:
        tl.store(
            p_out + b * o_b + (head * o_h + node * o_n)[:, None] + d[None, :],
            acc.to(p_out.dtype.element_ty),
            mask=in_m[:, None] & in_d[None, :],
        )


@triton.jit
def tree_attention_merge_kernel(
    p_parts,  # [B * G, splits, M, D] float32
    p_lse,  # [B * G, splits, M] float32, base 2
    p_out,  # [B, H, N, D]
    G,
    N,
    M,
    splits,
    o_b,
    o_h,
    o_n,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One output row: the parts of all splits, weighed by their log-sum-exps."""
    row = tl.program_id(0).to(tl.int64)
    bg, m = row // M, row % M
    b, head, node = bg // G, bg % G * (M // N) + m // N, m % N
    k, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    place = (bg * splits + k) * M + m
    lse = tl.load(p_lse + place, mask=k < splits, other=float("-inf"))
    some = lse > float("-inf")
    top = tl.max(lse, 0)
    weights = tl.where(some, tl.exp2(lse - tl.where(top > float("-inf"), top, 0.0)), 0.0)
    parts = tl.load(
        p_parts + place[:, None] * D + d[None, :], mask=some[:, None] & (d < D)[None, :], other=0.0
    )
    total = tl.sum(weights, 0)
    out = tl.sum(weights[:, None] * parts, 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(p_out + b * o_b + head * o_h + node * o_n + d, out.to(p_out.dtype.element_ty), mask=d < D)


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    ancestors: Tensor,
    k_tree: Tensor | None,
    v_tree: Tensor | None,
    starts: Tensor | None,
    scale: float,
    tail: int,
    longest: int,
    out: Tensor,
) -> Tensor:
    """Launches both kernels; arguments as :func:`specfuse.ops.tree_attention` checked them."""
    B, H, N, D = q.shape
    G, Smax = k_cache.shape[1:3]
    M = H // G * N
    device = _gpu(q.device.index) if q.device.type == "cuda" else _INTERPRETED
    config = _FLOAT32
    if q.element_size() == 2 or device is _INTERPRETED:
        sizes = {"S": longest, "M": _power_of_2(M), "BG": B * G, "cc": device.capability}
        config = tuned.config("tree_attention", sizes, q.device)
    block_m, block_s, block_d = min(config["BLOCK_M"], _power_of_2(M)), config["BLOCK_S"], _power_of_2(D)
    row_tiles = (M + block_m - 1) // block_m
    programs = B * G * row_tiles
    splits = config["splits"]
    if splits == 0:  # enough programs to fill the device once, none with less than 128 keys
        wanted = config["blocks_per_sm"] * device.multiprocessors // programs
        splits = max(1, min(wanted, longest // 128, 64))
    partial = splits > 1
    parts = q.new_empty((B * G, splits, M, D), dtype=torch.float32) if partial else out
    lse = q.new_empty((B * G, splits, M), dtype=torch.float32) if partial else out
    k_own, v_own = (k_cache, v_cache) if k_tree is None or v_tree is None else (k_tree, v_tree)
    tree_attention_kernel[(programs, splits)](
        *(q, k_cache, v_cache, k_own, v_own, ancestors, lengths),
        lengths if starts is None else starts,
        *(parts, lse, G, N, M, tail, Smax, splits, row_tiles, scale * _LOG2E),
        *(*q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3]),
        *(*k_own.stride()[:3], *v_own.stride()[:3], *out.stride()[:3]),
        D=D,
        BLOCK_M=block_m,
        BLOCK_S=block_s,
        BLOCK_T=16 if tail <= 16 else 32,
        BLOCK_D=block_d,
        HAS_TREE=k_tree is not None,
        HAS_STARTS=starts is not None,
        PARTIAL=partial,
        num_warps=config["num_warps"],
        num_stages=_stages(config["num_stages"], device, block_m, block_s, block_d, q.element_size()),
        enable_fp_fusion=True,
    )
    if partial:
        tree_attention_merge_kernel[(B * H * N,)](
            *(parts, lse, out, G, N, M, splits, *out.stride()[:3]),
            D=D,
            BLOCK_K=1 << (splits - 1).bit_length(),
            BLOCK_D=block_d,
            num_warps=2,
            enable_fp_fusion=True,
        )
    return out


class _Device(NamedTuple):
    capability: int  # 90 for sm_90
    multiprocessors: int
    shared_bytes: int  # of one block


# What the untuned configurations are looked up by when there is no GPU.
_INTERPRETED = _Device(90, 4, 232_448)


@lru_cache
def _gpu(index: int) -> _Device:
    found = torch.cuda.get_device_properties(index)
    # Not in the type stubs of every torch.
    shared: int = getattr(found, "shared_memory_per_block_optin")  # noqa: B009
    return _Device(10 * found.major + found.minor, found.multi_processor_count, shared)


def _stages(wanted: int, device: _Device, block_m: int, block_s: int, block_d: int, size: int) -> int:
    """At most ``wanted`` pipeline stages, as many as shared memory holds beside q and the weights."""
    room = device.shared_bytes - size * block_m * (block_d + block_s)
    # Where the tensor cores read shared memory (wgmma, tcgen05) every stage has a tile of K and V there;
    # elsewhere the one in use is in registers.
    in_registers = 0 if 90 <= device.capability < 120 else 1
    return max(1, min(wanted, room // (2 * size * block_s * block_d) + in_registers))


def _power_of_2(n: int) -> int:
    """The next one, at least 16: what a matrix product takes."""
    return max(16, 1 << (n - 1).bit_length())
