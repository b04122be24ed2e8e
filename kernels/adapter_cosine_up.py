"""Triton kernels of ``adapter_cosine``: the up projection, whose output stays in registers, and the score."""

# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _score(
    p_partial,  # [3, groups, M] float32: dot(y, t), |y|^2, |t|^2 of each group of tiles
    p_score,  # [M] float32
    p_accept,  # [M] uint8
    rows,
    M,
    groups,
    threshold,
    eps,
    BLOCK_M: tl.constexpr,
):
    """Sums the groups in a fixed order and writes score and decision of some rows."""
    CHUNK: tl.constexpr = 16
    plane = tl.cast(groups, tl.int64) * M
    dot = tl.zeros((BLOCK_M,), tl.float32)
    yy = tl.zeros((BLOCK_M,), tl.float32)
    tt = tl.zeros((BLOCK_M,), tl.float32)
    for g in range(0, groups, CHUNK):
        group = g + tl.arange(0, CHUNK)
        mask = (group[:, None] < groups) & (rows[None, :] < M)
        p = p_partial + group[:, None].to(tl.int64) * M + rows[None, :]
        # From L2: other blocks wrote them during this launch.
        dot += tl.sum(tl.load(p, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        yy += tl.sum(tl.load(p + plane, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        tt += tl.sum(tl.load(p + 2 * plane, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    score = dot / (tl.maximum(tl.sqrt(yy), eps) * tl.maximum(tl.sqrt(tt), eps))
    tl.store(p_score + rows, score, mask=rows < M)
    tl.store(p_accept + rows, (score >= threshold).to(tl.uint8), mask=rows < M)


@triton.jit
def _epilogue(
    acc,  # [BLOCK_M, COLS] product
    first,  # its first column of D
    dot,  # [BLOCK_M, PART] running sums of products of y and t, columns modulo PART
    yy,
    tt,
    p_bias,
    p_x,
    p_target,
    p_aligned,
    rows,
    M,
    D,
    stride_x,
    stride_t,
    RESIDUAL: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLS: tl.constexpr,
    PART: tl.constexpr,
):
    """Bias, residual and sums in parts: whole tiles of x and target would crowd out the accumulator."""
    if COLS > PART:
        HALF: tl.constexpr = COLS // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        dot, yy, tt = _epilogue(
            left, first, dot, yy, tt, p_bias, p_x, p_target, p_aligned, rows, M, D, stride_x, stride_t,
            RESIDUAL, WRITE, BLOCK_M, HALF, PART,
        )  # fmt: skip
        dot, yy, tt = _epilogue(
            right, first + HALF, dot, yy, tt, p_bias, p_x, p_target, p_aligned, rows, M, D, stride_x,
            stride_t, RESIDUAL, WRITE, BLOCK_M, HALF, PART,
        )  # fmt: skip
    else:
        # Columns outside D are 0 in all of it.
        cols = first + tl.arange(0, COLS)
        mask = (rows[:, None] < M) & (cols[None, :] < D)
        y = acc + tl.load(p_bias + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
        if RESIDUAL:
            p = p_x + rows[:, None] * stride_x + cols[None, :]
            y += tl.load(p, mask=mask, other=0.0).to(tl.float32)
        p = p_target + rows[:, None] * stride_t + cols[None, :]
        t = tl.load(p, mask=mask, other=0.0).to(tl.float32)
        if WRITE:
            p = p_aligned + rows[:, None] * D + cols[None, :]
            tl.store(p, y.to(p_aligned.dtype.element_ty), mask=mask)
        dot += y * t
        yy += y * y
        tt += t * t
    return dot, yy, tt


@triton.jit(do_not_specialize=("M", "groups"))
def up_kernel(
    p_h,  # [M, R] rows stride_h apart
    p_w,  # [D, R]
    p_bias,  # [D]
    p_x,  # [M, D] rows stride_x apart, read with RESIDUAL only
    p_target,  # [M, D] rows stride_t apart
    p_aligned,  # [M, D], written with WRITE only
    p_partial,  # [3, groups, M] float32 scratch
    p_score,  # [M] float32
    p_accept,  # [M] uint8
    p_arrivals,  # [tiles of M] int32 zeros, used with LAST_BLOCK only
    M,
    D,
    R,
    stride_h,
    stride_x,
    stride_t,
    groups,
    threshold,
    eps,
    RESIDUAL: tl.constexpr,
    WRITE: tl.constexpr,
    LAST_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Every groups-th tile of ``y = h @ w.T + bias (+ x)`` of a row block; dot and norms are kept."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_m = pid % tiles_m
    group = pid // tiles_m
    # 64-bit offsets, but 32-bit divisions: wide ones are subroutines.
    rows = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    # Columns whose sums of products stay apart until the tile is done: as many as there are registers for
    PART: tl.constexpr = min(BLOCK_N, 32 if BLOCK_N < 256 else 16)
    dot = tl.zeros((BLOCK_M,), tl.float32)
    yy = tl.zeros((BLOCK_M,), tl.float32)
    tt = tl.zeros((BLOCK_M,), tl.float32)
    for tile in range(group, tl.cdiv(D, BLOCK_N), groups):
        # Product
        cols = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r in range(0, R, BLOCK_K):
            k = r + tl.arange(0, BLOCK_K)
            h_mask = (rows[:, None] < M) & (k[None, :] < R)
            w_mask = (cols[None, :] < D) & (k[:, None] < R)
            b_h = tl.load(p_h + rows[:, None] * stride_h + k[None, :], mask=h_mask, other=0.0)
            b_w = tl.load(p_w + cols[None, :] * R + k[:, None], mask=w_mask, other=0.0)
            acc = tl.dot(b_h, b_w, acc, input_precision="ieee")

        # What the score needs of this tile
        sums = tl.zeros((BLOCK_M, PART), tl.float32)
        tile_dot, tile_yy, tile_tt = _epilogue(
            acc, tile * BLOCK_N, sums, sums, sums, p_bias, p_x, p_target, p_aligned, rows, M, D, stride_x,
            stride_t, RESIDUAL, WRITE, BLOCK_M, BLOCK_N, PART,
        )  # fmt: skip
        dot += tl.sum(tile_dot, 1)
        yy += tl.sum(tile_yy, 1)
        tt += tl.sum(tile_tt, 1)

    # One row of partial sums per group
    plane = tl.cast(groups, tl.int64) * M
    p = p_partial + group.to(tl.int64) * M + rows
    tl.store(p, dot, mask=rows < M)
    tl.store(p + plane, yy, mask=rows < M)
    tl.store(p + 2 * plane, tt, mask=rows < M)

    # Score by the last block of these rows, once all threads have stored
    if LAST_BLOCK:
        tl.debug_barrier()
        arrived = tl.atomic_add(p_arrivals + pid_m, 1, sem="acq_rel")
        if arrived == groups - 1:
            _score(p_partial, p_score, p_accept, rows, M, groups, threshold, eps, BLOCK_M)


@triton.jit(do_not_specialize=("M", "groups"))
def score_kernel(
    p_partial,  # [3, groups, M] float32
    p_score,  # [M] float32
    p_accept,  # [M] uint8
    M,
    groups,
    threshold,
    eps,
    BLOCK_M: tl.constexpr,
):
    """The score in a launch of its own: before the linear adapter nothing runs that could zero counters."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    _score(p_partial, p_score, p_accept, rows, M, groups, threshold, eps, BLOCK_M)
