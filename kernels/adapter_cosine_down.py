"""Triton kernels of ``adapter_cosine`` in front of the up projection: down, middle, activation."""

# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


# The number of rows changes from call to call: it is no reason to compile again.
@triton.jit(do_not_specialize=("M", "n_arrivals"))
def down_kernel(
    p_x,  # [M, D] rows stride_x apart
    p_w,  # [R, D]
    p_bias,  # [R], read with GELU only
    p_out,  # [SPLITS, M, R] partial sums in float32; with one split [M, R] in the storage dtype
    p_arrivals,  # [n_arrivals] int32 counters of the launches that follow, zeroed here
    M,
    D,
    R,
    stride_x,
    n_arrivals,
    SPLITS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``x @ w.T`` over one slice of D; GELU(... + bias) where nothing is left to add (one split)."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(R, BLOCK_N)
    # 64-bit offsets, but 32-bit divisions: wide ones are subroutines.
    rows = (pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = (pid // tiles_m % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    split = pid // (tiles_m * tiles_n)

    # Counters for later launches
    if pid == 0:
        for i in range(0, n_arrivals, 128):
            slots = i + tl.arange(0, 128)
            tl.store(p_arrivals + slots, 0, mask=slots < n_arrivals)

    # Slice of the contraction
    steps = tl.cdiv(tl.cdiv(D, BLOCK_K), SPLITS)
    first = split * steps * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        k = first + step * BLOCK_K + tl.arange(0, BLOCK_K)
        x_mask = (rows[:, None] < M) & (k[None, :] < D)
        w_mask = (cols[None, :] < R) & (k[:, None] < D)
        b_x = tl.load(p_x + rows[:, None] * stride_x + k[None, :], mask=x_mask, other=0.0)
        b_w = tl.load(p_w + cols[None, :] * D + k[:, None], mask=w_mask, other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision="ieee")

    # Partial sum or activation
    if GELU:
        acc += tl.load(p_bias + cols, mask=cols < R, other=0.0).to(tl.float32)[None, :]
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    out_mask = (rows[:, None] < M) & (cols[None, :] < R)
    out = p_out + (split.to(tl.int64) * M + rows[:, None]) * R + cols[None, :]
    tl.store(out, acc.to(p_out.dtype.element_ty), mask=out_mask)


@triton.jit
def _hidden(p_z, p_bias, rows, cols, M, R, SPLITS: tl.constexpr, BIAS: tl.constexpr, CACHE: tl.constexpr):
    """[rows, cols] of the sum of all splits, in a fixed order, plus the bias; 0 outside [M, R]."""
    mask = (rows[:, None] < M) & (cols[None, :] < R)
    if SPLITS == 1:
        p = p_z + rows[:, None] * R + cols[None, :]
        z = tl.load(p, mask=mask, other=0.0, cache_modifier=CACHE).to(tl.float32)
    else:
        splits = tl.arange(0, SPLITS).to(tl.int64)[:, None, None]
        p = p_z + (splits * M + rows[None, :, None]) * R + cols[None, None, :]
        z = tl.sum(tl.load(p, mask=mask[None, :, :], other=0.0, cache_modifier=CACHE).to(tl.float32), 0)
    if BIAS:
        z += tl.load(p_bias + cols, mask=cols < R, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _row_moments(
    p_z,
    p_bias,
    rows,
    M,
    R,
    eps,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    CACHE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mean and reciprocal standard deviation of each row, merged over chunks without cancellation."""
    mean = tl.zeros((BLOCK_M,), tl.float32)
    m2 = tl.zeros((BLOCK_M,), tl.float32)
    for r in range(0, R, BLOCK_K):
        cols = r + tl.arange(0, BLOCK_K)
        z = _hidden(p_z, p_bias, rows, cols, M, R, SPLITS, BIAS, CACHE)
        n = tl.minimum(R - r, BLOCK_K) * 1.0
        chunk_mean = tl.sum(z, 1) / n
        deviation = tl.where(cols[None, :] < R, z - chunk_mean[:, None], 0.0)
        delta = chunk_mean - mean
        mean += delta * (n / (r + n))
        m2 += tl.sum(deviation * deviation, 1) + delta * delta * (r * n / (r + n))
    return mean, 1.0 / tl.sqrt(m2 / R + eps)


@triton.jit
def _norm_relu(z, mean, rstd, p_gain, p_shift, cols, R):
    """ReLU(LayerNorm(z)) for some columns; 0 outside R."""
    gain = tl.load(p_gain + cols, mask=cols < R, other=0.0).to(tl.float32)
    shift = tl.load(p_shift + cols, mask=cols < R, other=0.0).to(tl.float32)
    h = (z - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
    # Not tl.maximum: it would turn NaN into 0, and a broken row into an ordinary score.
    return tl.where(h < 0.0, 0.0, h)


@triton.jit(do_not_specialize=("M",))
def middle_kernel(
    p_z,  # [SPLITS, M, R] sums of the down projection
    p_bias1,  # [R] of the down projection
    p_gain1,  # [R]
    p_shift1,  # [R]
    p_w,  # [R, R]
    p_bias2,  # [R]
    p_gain2,  # [R]
    p_shift2,  # [R]
    p_mid,  # [M, R] scratch: the middle projection before its LayerNorm
    p_h,  # [M, R] the input of the up projection, in the storage dtype
    p_arrivals,  # [tiles of M] int32 zeros
    M,
    R,
    eps,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the middle projection; the last tile of a row block to arrive normalises these rows."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(R, BLOCK_N)
    pid_m = pid % tiles_m
    rows = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    out_cols = pid // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)

    # First LayerNorm and ReLU on the way into the product
    mean, rstd = _row_moments(p_z, p_bias1, rows, M, R, eps, SPLITS, True, "", BLOCK_M, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, R, BLOCK_K):
        cols = r + tl.arange(0, BLOCK_K)
        w_mask = (out_cols[None, :] < R) & (cols[:, None] < R)
        b_w = tl.load(p_w + out_cols[None, :] * R + cols[:, None], mask=w_mask, other=0.0)
        z = _hidden(p_z, p_bias1, rows, cols, M, R, SPLITS, True, "")
        h = _norm_relu(z, mean, rstd, p_gain1, p_shift1, cols, R)
        acc = tl.dot(h.to(b_w.dtype), b_w, acc, input_precision="ieee")
    acc += tl.load(p_bias2 + out_cols, mask=out_cols < R, other=0.0).to(tl.float32)[None, :]
    out_mask = (rows[:, None] < M) & (out_cols[None, :] < R)
    p_out = p_mid + rows[:, None] * R + out_cols[None, :]
    tl.store(p_out, acc.to(p_mid.dtype.element_ty), mask=out_mask)

    # All threads have stored before one of them says so
    tl.debug_barrier()
    arrived = tl.atomic_add(p_arrivals + pid_m, 1, sem="acq_rel")

    # Second LayerNorm and ReLU by the last tile
    if arrived == tiles_n - 1:
        mean, rstd = _row_moments(p_mid, p_bias2, rows, M, R, eps, 1, False, ".cg", BLOCK_M, BLOCK_K)
        for r in range(0, R, BLOCK_K):
            cols = r + tl.arange(0, BLOCK_K)
            z = _hidden(p_mid, p_bias2, rows, cols, M, R, 1, False, ".cg")
            h = _norm_relu(z, mean, rstd, p_gain2, p_shift2, cols, R)
            mask = (rows[:, None] < M) & (cols[None, :] < R)
            tl.store(p_h + rows[:, None] * R + cols[None, :], h.to(p_h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("M",))
def activate_kernel(
    p_z,  # [SPLITS, M, R] sums of the down projection
    p_bias,  # [R]
    p_h,  # [M, R] the input of the up projection, in the storage dtype
    M,
    R,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """GELU of the sum of all splits: the residual MLP between its two products."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    rows = (pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = pid // tiles_m * BLOCK_K + tl.arange(0, BLOCK_K)
    z = _hidden(p_z, p_bias, rows, cols, M, R, SPLITS, True, "")
    h = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    mask = (rows[:, None] < M) & (cols[None, :] < R)
    tl.store(p_h + rows[:, None] * R + cols[None, :], h.to(p_h.dtype.element_ty), mask=mask)
