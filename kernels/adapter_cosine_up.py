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
def _halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of a [ROWS, COLS] tile."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
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

        # Epilogue in four parts, so that the tiles of x and target do not crowd out the accumulator
        QUARTER: tl.constexpr = BLOCK_N // 4
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        part0, part1 = _halves(left, BLOCK_M, BLOCK_N // 2)
        part2, part3 = _halves(right, BLOCK_M, BLOCK_N // 2)
        for part in tl.static_range(4):
            if part == 0:
                y = part0
            elif part == 1:
                y = part1
            elif part == 2:
                y = part2
            else:
                y = part3
            # Columns outside D are 0 in all of it.
            d = tile * BLOCK_N + part * QUARTER + tl.arange(0, QUARTER)
            mask = (rows[:, None] < M) & (d[None, :] < D)
            y += tl.load(p_bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            if RESIDUAL:
                p = p_x + rows[:, None] * stride_x + d[None, :]
                y += tl.load(p, mask=mask, other=0.0).to(tl.float32)
            p = p_target + rows[:, None] * stride_t + d[None, :]
            t = tl.load(p, mask=mask, other=0.0).to(tl.float32)
            if WRITE:
                p = p_aligned + rows[:, None] * D + d[None, :]
                tl.store(p, y.to(p_aligned.dtype.element_ty), mask=mask)
            dot += tl.sum(y * t, 1)
            yy += tl.sum(y * y, 1)
            tt += tl.sum(t * t, 1)

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


@triton.jit
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
