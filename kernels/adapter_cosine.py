"""Adapter + cosine in Triton: at most three launches, and the adapted ``[M, D]`` never reaches memory.

The idea. The down projection is split over D, so that a handful of rows still occupies every
multiprocessor: each split leaves float32 partial sums (launch 1). The middle launch adds them in a fixed
order on its way into the second product; LayerNorm needs whole rows, so the last tile of a row block to
arrive applies the second one (launch 2). The up projection keeps ``y`` in registers: its epilogue adds bias
and residual and accumulates ``dot(y, t)``, ``|y|^2`` and ``|t|^2``; the last block of a row block turns the
partial sums into the score (launch 3). Counters of arrivals are zeroed by launch 1, so a replayed graph
finds them zero, and no sum is an atomic: the same inputs give the same bits.

    adapter        launches
    lightweight    down, middle, up
    residual MLP   down (+ GELU), up               one split
                   down, activate, up              several splits
    linear         up, score                       nothing runs before it that could zero counters

What must move, in bytes of the storage dtype (itemsize s), and be computed; lightweight::

    bytes = s (2 D R + R^2 + 2 M D) + 5 M      weights, x and target once
    flops = 2 M (2 D R + R^2)

On an H200 (4.3 TB/s measured copy, 790 TFLOP/s bf16 measured) with bfloat16 that is at least::

    M      D        R      bytes     flops     floor
    1      4,096    256    4.3 MB    4.3 M     1.0 us   bytes (three launches cost more than that)
    16     4,096    256    4.6 MB    69 M      1.1 us   bytes
    64     4,096    1,024  20 MB     1.2 G     4.6 us   bytes
    1,024  4,096    256    21 MB     4.4 G     5.6 us   operations
    4,096  4,096    1,024  86 MB     77 G      98 us    operations
    1      150,528  512    309 MB    0.3 G     72 us    bytes
    16     150,528  512    318 MB    4.9 G     74 us    bytes
    1,024  150,528  512    925 MB    316 G     400 us   operations

What this design adds to the floor: x is read a second time as the residual, and the partial sums
``4 SPLITS M R`` bytes are written once and read ``2 R / MID_N`` times, from L2.

Limits: one dtype for everything (float32, float16, bfloat16), float32 accumulation. float32 products are
exact (no TF32) and run without tensor cores: that path is for checking, not for speed. Rows that do not
start at multiples of 16 elements (an odd D or R, some slices) are right but slow. Squares of norms are
float32: values beyond about 1e16 at D = 150,528 overflow to a NaN score. Not yet run on a GPU: compiled for
sm_80 to sm_120, and interpreted on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from specfuse.kernels import tuned
from specfuse.kernels.adapter_cosine_down import activate_kernel, down_kernel, middle_kernel
from specfuse.kernels.adapter_cosine_ref import KINDS, LAYER_NORM_EPS
from specfuse.kernels.adapter_cosine_up import score_kernel, up_kernel

SCORE_ROWS = 32
# float32 operands take twice the room and, without tensor cores, more registers; rows that do not start at
# multiples of 16 elements pass through registers on their way to shared memory.
SMALL_TILES = {"DOWN_M": 32, "DOWN_N": 32, "DOWN_K": 32, "DOWN_WARPS": 4, "MID_M": 16, "MID_N": 32}
SMALL_TILES |= {
    "MID_K": 32,
    "MID_WARPS": 4,
    "MID_STAGES": 2,
    "UP_M": 32,
    "UP_N": 32,
    "UP_K": 16,
    "UP_WARPS": 4,
    "UP_STAGES": 2,
}


def adapter_cosine_triton(
    x: Tensor, weights: Sequence[Tensor], target: Tensor, threshold: float, eps: float, return_aligned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(score [M], accept [M], aligned [M, D] or [0, D])``; inputs as checked by the op."""
    x, target = (t if t.stride(1) == 1 else t.contiguous() for t in (x, target))
    weights = [w.contiguous() for w in weights]
    M, D = target.shape
    R = x.shape[1] if KINDS[len(weights)] == "linear" else weights[0].shape[0]
    c = choose(M, D, R, x, target)
    score = torch.empty(M, dtype=torch.float32, device=x.device)
    accept = torch.empty(M, dtype=torch.bool, device=x.device)
    aligned = torch.empty((M if return_aligned else 0, D), dtype=x.dtype, device=x.device)
    if M == 0:
        return score, accept, aligned
    tiles_m = triton.cdiv(M, c["UP_M"])
    groups = min(triton.cdiv(D, c["UP_N"]), triton.cdiv(c["UP_PROGRAMS"], tiles_m))
    arrivals = torch.empty(tiles_m + triton.cdiv(M, c["MID_M"]), dtype=torch.int32, device=x.device)
    partial = torch.empty((3, groups, M), dtype=torch.float32, device=x.device)
    linear = KINDS[len(weights)] == "linear"
    h = x if linear else _hidden(x, weights, arrivals, c)
    up_kernel[(tiles_m * groups,)](
        h, weights[-2], weights[-1], x, target, aligned, partial, score, accept.view(torch.uint8),
        arrivals[:tiles_m], M, D, R, h.stride(0), x.stride(0), target.stride(0), groups, threshold, eps,
        RESIDUAL=not linear, WRITE=return_aligned, LAST_BLOCK=not linear,
        BLOCK_M=c["UP_M"], BLOCK_N=c["UP_N"], BLOCK_K=c["UP_K"],
        num_warps=c["UP_WARPS"], num_stages=c["UP_STAGES"], enable_fp_fusion=True,
    )  # fmt: skip
    if linear:
        score_kernel[(triton.cdiv(M, SCORE_ROWS),)](
            partial, score, accept.view(torch.uint8), M, groups, threshold, eps,
            BLOCK_M=SCORE_ROWS, enable_fp_fusion=True,
        )  # fmt: skip
    return score, accept, aligned


def _hidden(x: Tensor, weights: Sequence[Tensor], arrivals: Tensor, c: Mapping[str, Any]) -> Tensor:
    """``[M, R]``: what the up projection multiplies, in the storage dtype."""
    (M, D), R, splits = x.shape, weights[0].shape[0], c["SPLITS"]
    mlp = KINDS[len(weights)] == "residual_mlp"
    # With one split nothing is left to add, and the storage dtype halves what the next launch reads.
    scratch = torch.float32 if splits > 1 else x.dtype
    z = torch.empty((splits, M, R), dtype=scratch, device=x.device)
    tiles = triton.cdiv(M, c["DOWN_M"]) * triton.cdiv(R, c["DOWN_N"])
    down_kernel[(tiles * splits,)](
        x, weights[0], weights[1], z, arrivals, M, D, R, x.stride(0), arrivals.numel(),
        SPLITS=splits, GELU=mlp and splits == 1,
        BLOCK_M=c["DOWN_M"], BLOCK_N=c["DOWN_N"], BLOCK_K=c["DOWN_K"],
        num_warps=c["DOWN_WARPS"], num_stages=c["DOWN_STAGES"], enable_fp_fusion=True,
    )  # fmt: skip
    if mlp and splits == 1:
        return z[0]
    h = torch.empty((M, R), dtype=x.dtype, device=x.device)
    tiles_m = triton.cdiv(M, c["MID_M"])
    if mlp:
        activate_kernel[(tiles_m * triton.cdiv(R, c["MID_K"]),)](
            z, weights[1], h, M, R,
            SPLITS=splits, BLOCK_M=c["MID_M"], BLOCK_K=c["MID_K"], num_warps=c["MID_WARPS"],
            enable_fp_fusion=True,
        )  # fmt: skip
        return h
    middle_kernel[(tiles_m * triton.cdiv(R, c["MID_N"]),)](
        z, *weights[1:8], torch.empty((M, R), dtype=scratch, device=x.device), h, arrivals[-tiles_m:],
        M, R, LAYER_NORM_EPS,
        SPLITS=splits, BLOCK_M=c["MID_M"], BLOCK_N=c["MID_N"], BLOCK_K=c["MID_K"],
        num_warps=c["MID_WARPS"], num_stages=c["MID_STAGES"], enable_fp_fusion=True,
    )  # fmt: skip
    return h


def choose(M: int, D: int, R: int, x: Tensor, target: Tensor) -> dict[str, Any]:
    """The tuned configuration of this size; small tiles for float32 and for rows that are not aligned."""
    c = dict(tuned.config("adapter_cosine", {"M": M, "D": D, "R": R}, x.device))
    steps = (D, R, x.stride(0), target.stride(0), x.data_ptr(), target.data_ptr())
    if x.dtype == torch.float32 or any(step % 16 for step in steps):
        c |= {name: min(c[name], limit) for name, limit in SMALL_TILES.items()}
    return c
