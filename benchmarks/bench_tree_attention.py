"""tree_attention against scaled_dot_product_attention under a dense mask, on the CPU or on CUDA.

    python benchmarks/bench_tree_attention.py [--device cuda] [--only TEXT] [--csv FILE]
    pytest benchmarks/bench_tree_attention.py          # the same calls under pytest-benchmark

`eager` is what Hugging Face's sdpa runs for a tree: keys and values of grouped heads repeated, then attention
under a bool mask that is ready made. `torch` is PyTorch's flash attention over the prefix (its bounds known
on the host) with the tree merged in eagerly; `flash` is flash-attn 2 and `flashinfer` its prefill kernel with
a custom mask, where they import. `bytes` is K and V once, q and the output; `flops` the two products.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from harness import Case, Tuning, main, parametrize, run_case
from timing import interleaved_us
from torch import Tensor

from specfuse.kernels.tree_attention_eager import TreeInputs, prefix_and_tree
from specfuse.ops.tree_attention import tree_attention

H, D = 32, 128
# 8 frames of Video-LLaVA with a question, 8 images of LLaVA at 336 px with one (tokens in the cache).
PREFIXES = (2091, 4643)
NODES = (16, 32, 64)


class HostBounds(TreeInputs):
    """Inputs whose rows are all ``longest`` long, so that nobody asks the device."""

    def bounds(self) -> tuple[list[int], list[int]]:
        return [0] * self.q.shape[0], [self.longest] * self.q.shape[0]


def inputs(B: int, H: int, G: int, S: int, N: int, D: int, device: str) -> TreeInputs:
    """Rows of one length, with room behind the tree as in a cache that will grow; a random tree each."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    words = [1]
    for i in range(1, N):
        words.append(words[int(torch.randint(i, (1,), generator=generator))] | 1 << i)
    signed = [word - 2**64 if word >= 2**63 else word for word in words]
    q = torch.randn(B, N, H, D, dtype=dtype, device=device).transpose(1, 2)
    k, v = (torch.randn(B, G, S + N + 64, D, dtype=dtype, device=device) for _ in range(2))
    lengths = torch.full((B,), S, device=device)
    bits = torch.tensor(signed, device=device).repeat(B, 1)
    return TreeInputs(q, k, v, lengths, bits, None, None, None, D**-0.5, N, S)


def dense_mask(x: TreeInputs) -> Tensor:
    sees = x.sees()
    return torch.cat([sees.new_ones(*sees.shape[:2], x.longest), sees], dim=2)[:, None]


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def op(x: TreeInputs, implementation: str = "auto") -> Tensor:
    return tree_attention(
        *(x.q, x.k_cache, x.v_cache, x.lengths, x.ancestors), longest=x.longest, implementation=implementation
    )


def flashinfer(x: TreeInputs, mask: Tensor) -> Tensor:
    from flashinfer import single_prefill_with_kv_cache

    k, v = (t[0, :, : x.longest + x.tail] for t in (x.k_cache, x.v_cache))
    query = x.q[0].transpose(0, 1)
    out = single_prefill_with_kv_cache(query, k, v, custom_mask=mask[0, 0], kv_layout="HND")
    return out.transpose(0, 1)[None]


def peers(x: TreeInputs, mask: Tensor) -> dict[str, Callable[[], object]]:
    """What imports and runs here, other than PyTorch."""
    found: dict[str, Callable[[], object]] = {}
    if x.q.device.type == "cpu":
        return found
    candidates = {"flash": partial(op, x, "flash")}
    if x.q.shape[0] == 1:
        candidates["flashinfer"] = partial(flashinfer, x, mask)
    for name, call in candidates.items():
        try:
            interleaved_us({name: call}, "cuda", 2)  # it must also go into a graph
            found[name] = call
        except Exception as error:  # a peer that is missing or too old is no reason to measure nothing
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    return found


def agree(x: TreeInputs, calls: dict[str, Callable[[], object]]) -> None:
    """Every provider is at most twice as far from float32 attention as eager, up to a step of rounding."""
    k, v = (t[:, :, : x.longest + x.tail].float() for t in (x.k_cache, x.v_cache))
    truth = eager(x.q.float(), k, v, dense_mask(x))
    worst = {name: float((call().float() - truth).abs().max()) for name, call in calls.items()}  # type: ignore[attr-defined]
    allowed = 2 * worst["eager"] + (1e-5 if x.q.dtype == torch.float32 else 1e-3)
    assert all(error <= allowed for error in worst.values()), f"{worst}, allowed {allowed}"


def one_case(B: int, H: int, G: int, S: int, N: int, D: int, device: str, small: bool = False) -> Case:
    x = inputs(B, H, G, S, N, D, device)
    mask = dense_mask(x)
    k, v = x.k_cache[:, :, : S + N], x.v_cache[:, :, : S + N]
    calls: dict[str, Callable[[], object]] = {
        "eager": partial(eager, x.q, k, v, mask),
        "specfuse": partial(op, x),
        "torch": partial(prefix_and_tree, HostBounds(*x), flash=False),
        **peers(x, mask),
    }
    return Case(
        name=f"B{B}-H{H}-G{G}-S{S}-N{N}-D{D}-{'fp32' if device == 'cpu' else 'bf16'}",
        providers=calls,
        check=partial(agree, x, calls),
        bytes=x.q.element_size() * D * B * (2 * G * (S + N) + 2 * H * N),
        flops=4 * B * H * N * (S + N) * D,
        sizes={"S": S, "N": N, "B": B, "G": G},
        small=small,
        # One size is enough to see that there is nothing for a compiler to fuse here.
        compile=calls["eager"] if (B, N) == (1, 32) else None,
    )


def cases(device: str) -> Iterator[Case]:
    yield one_case(1, 8, 2, 300, 16, 64, device, small=True)
    yield one_case(2, 8, 8, 523, 64, 64, device, small=True)
    if device == "cpu":
        yield one_case(1, H, H, PREFIXES[0], 32, D, device, small=True)
        return
    for B in (1, 8):
        for G in (32, 8):
            for S in PREFIXES:
                for N in NODES:
                    yield one_case(B, H, G, S, N, D, device)


def candidates(M: int) -> list[dict[str, int]]:
    """Key tiles, warps, stages and programs per multiprocessor that go with M packed rows."""
    block_m = min(128, max(16, 1 << (M - 1).bit_length()))
    shapes = [(32, 4, 3), (32, 4, 5), (64, 4, 2), (64, 4, 3), (64, 4, 4)]
    if block_m >= 64:
        shapes = [*shapes[2:], (64, 8, 2), (64, 8, 3), (128, 8, 2), (128, 8, 3)]
    return [
        {"BLOCK_M": block_m, "BLOCK_S": block_s, "splits": 0, "blocks_per_sm": per_sm}
        | {"num_warps": warps, "num_stages": stages}
        for block_s, warps, stages in shapes
        for per_sm in (1, 2)
    ]


def tunings(device: str) -> Iterator[Tuning]:
    """A launch is looked up by prefix, packed rows per kv head and kv heads of the batch."""
    major, minor = torch.cuda.get_device_capability()
    for B, G in ((1, 32), (8, 32), (1, 8), (8, 8)):
        for N in NODES:
            x = inputs(B, H, G, PREFIXES[0], N, D, device)
            k, v = (t[:, :, : x.longest + N] for t in (x.k_cache, x.v_cache))
            calls = {"eager": partial(eager, x.q, k, v, dense_mask(x)), "specfuse": partial(op, x)}
            M = H // G * N
            sizes = {"S": x.longest, "M": M, "BG": B * G, "cc": 10 * major + minor}
            yield Tuning(sizes, candidates(M), calls["specfuse"], partial(agree, x, calls))


def pytest_generate_tests(metafunc: object) -> None:
    parametrize(metafunc, cases)


def test_bench_tree_attention(benchmark: object, case: Callable[[], Case], provider: str) -> None:
    run_case(benchmark, case, provider)


if __name__ == "__main__":
    main(__doc__, cases)
