"""Output head + tree verification in Triton: logits are used where they are computed and never written.

The idea: a program multiplies BLOCK_M rows of hidden states by BLOCK_V rows of the head, rounds the products
to the storage dtype as the head itself would, and keeps five numbers per row: the largest logit, the sum of
exponentials, the best perturbed score with its token and its distance to the largest logit. A second launch
merges the tiles of each node in a fixed order, a third walks the trees.

Bytes: V * D * itemsize, the head read once; 32,000 x 4,096 bf16 are 262 MB, 61 us at an H200's 4.3 TB/s. What
this saves over a head and verify_tree is writing and reading the logits, 2 * B * N * V * itemsize: 8 MB or
2 us at B * N = 64, 131 MB or 30 us at 1,024. Operations: 2 * B * N * V * D, 17 GFLOP or 21 us of 790 TFLOP/s
at 64 rows; they weigh more than the bytes from about 180 rows on. Noise costs about 100 integer instructions
per four logits, only where a row of the program is sampled. So a few percent are to be won at small trees,
and only if the product is as fast as a tuned library's.

Programs of one head tile and different rows run next to each other, so that the head comes from L2 after the
first. Each of the V / BLOCK_V tiles reads all hidden states from L2 again: where BLOCK_V is below B * N, that
is more than it reads of the head.

Limits: no top-k, top-p or min-p, which need more than one number per tile; V below 2**31; compiled and
interpreted, not run on a GPU. Scores are float32: tokens can differ from the reference where two of them
agree to about 1e-6, and where another order of additions rounds a logit to its neighbour.
"""

# Triton annotates only its constants.
# mypy: allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specfuse.kernels import tuned
from specfuse.kernels.philox import gumbel, noise_tile


@triton.jit
def node_depths(parents, b, node, N, inside):
    """Steps from each node to its root; [ROWS] int64 b and node. Parents lie before their children."""
    depth = tl.zeros_like(node)
    active = inside
    while tl.max(active.to(tl.int32), 0) > 0:
        parent = tl.load(parents + b * N + node, mask=active, other=-1).to(tl.int64)
        active = active & (parent >= 0) & (parent < node)  # padding may hold anything
        depth += active.to(tl.int64)
        node = tl.where(active, parent, node)
    return depth


@triton.jit
def inverse_temperature(temperature):
    """1 / temperature, at most the largest float32; 1 for greedy rows, whose log-probabilities are at 1."""
    return tl.minimum(1.0 / tl.where(temperature > 0, temperature, 1.0), 3.4028234663852886e38)


@triton.jit
def lm_head_verify_kernel(
    hidden,  # [B, N, D]
    weight,  # [V, D]
    bias,  # [V], read where HAS_BIAS
    parents,  # [B, N]
    temperature,  # [B], as seed and positions
    seed,
    positions,
    tile_floats,  # [rows, 4, tiles] out: largest logit, sum, best score, its distance to the largest
    tile_tokens,  # [rows, tiles] out
    stride_hb,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    N,
    rows,
    V,
    D,
    tiles,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Five numbers per row and tile of BLOCK_V tokens; grid (row blocks, tiles)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1).to(tl.int64)
    token = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside, known = row < rows, token < V
    b, node = row // N, row % N

    # logits of the tile
    p_hidden = hidden + (b * stride_hb + node * stride_hn)[:, None]
    p_weight = weight + (token * stride_wv)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)  # times V where the head is stored transposed
        h_mask, w_mask = inside[:, None] & (d < D)[None, :], known[None, :] & (d < D)[:, None]
        b_hidden = tl.load(p_hidden + d[None, :] * stride_hd, mask=h_mask, other=0.0)
        b_weight = tl.load(p_weight + d[:, None] * stride_wd, mask=w_mask, other=0.0)
        acc = tl.dot(b_hidden, b_weight, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + token, mask=known, other=0.0).to(tl.float32)[None, :]
    # The head returns its own dtype, and verify_tree would read that.
    x = acc.to(hidden.dtype.element_ty).to(tl.float32)
    x = tl.where(known[None, :], x, float("-inf"))

    # softmax relative to the tile's largest logit
    t = tl.load(temperature + b, mask=inside, other=0.0)
    broken = tl.max((x != x).to(tl.int32), 1) > 0
    x = tl.where(x != x, float("-inf"), x)  # comparisons below are between numbers
    largest = tl.max(x, 1)
    # Differences of equal infinities are not numbers.
    z = tl.where(x == largest[:, None], 0.0, (x - largest[:, None]) * inverse_temperature(t)[:, None])
    z = tl.where(x == float("-inf"), float("-inf"), z)
    total = tl.sum(tl.exp(z), 1)

    # best score: the lowest token among equals
    score = z
    if tl.max(t, 0) > 0:
        depth = node_depths(parents, b, node, N, inside)
        position = tl.load(positions + b, mask=inside, other=0) + depth + 1
        b_seed = tl.load(seed + b, mask=inside, other=0)
        noise = gumbel(noise_tile(b_seed, position, tile * (BLOCK_V // 4), BLOCK_M, BLOCK_V))
        score = tl.where(t[:, None] > 0, z + noise, z)
    best = tl.argmax(score, 1, tie_break_left=True)
    here = tl.arange(0, BLOCK_V)[None, :] == best[:, None]

    p_tile = tile_floats + row * 4 * tiles + tile
    tl.store(p_tile, tl.where(broken, float("nan"), largest), mask=inside)
    tl.store(p_tile + tiles, total, mask=inside)
    tl.store(p_tile + 2 * tiles, tl.max(score, 1), mask=inside)
    tl.store(p_tile + 3 * tiles, tl.sum(tl.where(here, z, 0.0), 1), mask=inside)
    tl.store(tile_tokens + row * tiles + tile, (tile * BLOCK_V + best).to(tl.int32), mask=inside)


@triton.jit
def merge_kernel(
    tile_floats,  # [rows, 4, tiles]
    tile_tokens,  # [rows, tiles]
    temperature,  # [B]
    choice,  # [rows] out, -1 where there is no distribution
    logprob,  # [rows] out
    N,
    tiles,
    BLOCK_T: tl.constexpr,
):
    """The token of one row and its log-probability, from all its tiles; grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK_T)
    inside, p_row = tile < tiles, tile_floats + row * 4 * tiles + tile
    largest = tl.load(p_row, mask=inside, other=float("-inf"))
    total = tl.load(p_row + tiles, mask=inside, other=0.0)
    score = tl.load(p_row + 2 * tiles, mask=inside, other=float("-inf"))
    value = tl.load(p_row + 3 * tiles, mask=inside, other=float("-inf"))
    token = tl.load(tile_tokens + row * tiles + tile, mask=inside, other=0)

    t = tl.load(temperature + row // N)
    broken = tl.max((largest != largest).to(tl.int32), 0) > 0
    largest = tl.where(largest != largest, float("-inf"), largest)
    maximum = tl.max(largest, 0)
    shift = tl.where(largest == maximum, 0.0, (largest - maximum) * inverse_temperature(t))
    mass = tl.sum(total * tl.exp(shift), 0)
    here = tile == tl.argmax(score + shift, 0, tie_break_left=True)
    best = tl.sum(tl.where(here, token, 0), 0).to(tl.int64)
    emitted = tl.sum(tl.where(here, value + shift, 0.0), 0) - tl.log(mass)

    usable = (t >= 0) & (t < float("inf"))
    none = broken | (maximum == float("-inf")) | ((maximum == float("inf")) & (t > 0)) | (usable == 0)
    tl.store(choice + row, tl.where(none, -1, best))
    # inf - inf: a greedy row with an infinite logit has an argmax but no probabilities.
    tl.store(logprob + row, tl.where(none | (maximum == float("inf")), float("nan"), emitted))


@triton.jit
def walk_kernel(
    choice,  # [B, N]
    logprob,  # [B, N]
    tokens,  # [B, N]
    parents,  # [B, N]
    num_nodes,  # [B]
    path,  # [B, N] out, padded with -1
    length,  # [B] out
    next_token,  # [B] out
    logprobs,  # [B, N] out, padded with 0
    N,
    BLOCK_N: tl.constexpr,
):
    """The walk of one tree over the tokens chosen at its nodes; grid (B,)."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)
    count = tl.minimum(tl.load(num_nodes + b), N)
    held = tl.load(tokens + b * N + i, mask=i < count, other=-1)
    above = tl.load(parents + b * N + i, mask=i < count, other=-1)
    visited_nodes, visited_logprobs = tl.full((BLOCK_N,), -1, tl.int32), tl.zeros((BLOCK_N,), tl.float32)
    token = tl.full((), -1, tl.int64)
    visited = count * 0
    node = tl.where(count > 0, 0, -1)
    while node >= 0:
        token = tl.load(choice + b * N + node)
        visited_nodes = tl.where(i == visited, node, visited_nodes)
        visited_logprobs = tl.where(i == visited, tl.load(logprob + b * N + node), visited_logprobs)
        visited += 1
        fits = (above == node) & (held == token) & (i > node) & (i < count) & (token >= 0)
        child = tl.min(tl.where(fits, i, BLOCK_N), 0)
        node = tl.where(child < BLOCK_N, child, -1)
    tl.store(path + b * N + i, visited_nodes, mask=i < N)
    tl.store(logprobs + b * N + i, visited_logprobs, mask=i < N)
    tl.store(length + b, visited)
    tl.store(next_token + b, token)


# Where rows do not start at 16 bytes, loads go element by element, and larger tiles spill their addresses.
UNALIGNED = {"BLOCK_M": 16, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}


def _config(hidden: Tensor, weight: Tensor) -> dict[str, int]:
    """Tile sizes and launch options for these tensors."""
    if any(step % 16 for step in (*hidden.stride()[:2], weight.stride(0), hidden.shape[2])):
        return dict(UNALIGNED)
    sizes = {"M": hidden.shape[0] * hidden.shape[1], "V": weight.shape[0], "itemsize": hidden.element_size()}
    return dict(tuned.config("lm_head_verify", sizes, hidden.device))


def lm_head_verify(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    temperature: Tensor,
    seed: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and meaning are those of :func:`specfuse.ops.lm_head_verify.lm_head_verify`."""
    (B, N, D), V, rows = hidden.shape, weight.shape[0], hidden.shape[0] * hidden.shape[1]
    new = hidden.new_empty
    path, length = new((B, N), dtype=torch.int32), new((B,), dtype=torch.int32)
    next_token, logprobs = new((B,), dtype=torch.int64), new((B, N), dtype=torch.float32)
    if B == 0:
        return path, length, next_token, logprobs
    config = _config(hidden, weight)
    # Left to itself, Triton 3.10 no longer fuses multiplications with additions.
    fused = {"enable_fp_fusion": True}
    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
    tiles = triton.cdiv(V, config["BLOCK_V"])
    tile_floats, tile_tokens = (
        new((rows, 4, tiles), dtype=torch.float32),
        new((rows, tiles), dtype=torch.int32),
    )
    choice, logprob = new((B, N), dtype=torch.int64), new((B, N), dtype=torch.float32)
    if rows:
        lm_head_verify_kernel[(triton.cdiv(rows, config["BLOCK_M"]), tiles)](
            hidden, weight, weight if bias is None else bias, parents, temperature, seed, positions,
            tile_floats, tile_tokens, *hidden.stride(), *weight.stride(), N, rows, V, D, tiles,
            HAS_BIAS=bias is not None, **config, **options, **fused,
        )  # fmt: skip
        block = triton.next_power_of_2(tiles)
        merge_kernel[(rows,)](
            tile_floats, tile_tokens, temperature, choice, logprob, N, tiles, block, **fused
        )
    walk_kernel[(B,)](choice, logprob, tokens, parents, num_nodes, path, length, next_token, logprobs, N,
                      triton.next_power_of_2(max(N, 1)), **fused)  # fmt: skip
    return path, length, next_token, logprobs
