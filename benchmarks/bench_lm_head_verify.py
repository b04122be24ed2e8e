"""lm_head_verify, a prototype, against the output head followed by verify_tree.

`eager` is torch.nn.functional.linear and verify_tree, which writes the logits and reads them again; it is
also what decides whether the prototype stays. Counted are the head's bytes and the operations of the
product. On a CPU the prototype is its eager reference: only a GPU tells what it is worth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Case, Tuning, main, parametrize, run_case
from torch import Tensor

from specfuse.ops import AcceptedPath, verify_tree
from specfuse.ops.lm_head_verify import lm_head_verify
from specfuse.tree import TokenTree

# B, N, D, V: LLaMA-7B's head at several trees and batches, a large vocabulary, a small model.
SHAPES = [
    (1, 16, 4096, 32000),
    (1, 64, 4096, 32000),
    (8, 64, 4096, 32000),
    (1, 64, 3584, 152064),
    (1, 16, 256, 32000),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RULES = {"greedy": 0.0, "sampled": 1.0}


def inputs(
    B: int, N: int, D: int, V: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, TokenTree]:
    """Multiples of 1/8: every order of additions gives the same logits, so that results can be compared."""
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randint, -8, 9, generator=generator, device=device)
    parents = torch.tensor([-1, *[0 if i % 4 == 1 else i - 1 for i in range(1, N)]], dtype=torch.int32)
    tree = TokenTree(
        torch.arange(N, device=device).repeat(B, 1),
        parents.to(device).repeat(B, 1),
        torch.full((B,), N, dtype=torch.int32, device=device),
    )
    return draw((B, N, D)).to(dtype) / 8, draw((V, D)).to(dtype) / 8, tree


def eager(hidden: Tensor, weight: Tensor, tree: TokenTree, temperature: float) -> AcceptedPath:
    return verify_tree(torch.nn.functional.linear(hidden, weight), tree, temperature=temperature, seed=7)


def fused(hidden: Tensor, weight: Tensor, tree: TokenTree, temperature: float) -> AcceptedPath:
    return lm_head_verify(hidden, weight, tree, temperature=temperature, seed=7, experimental=True)


def check(*arguments: Any) -> None:
    ours, theirs = fused(*arguments), eager(*arguments)
    assert all(torch.equal(a, e) for a, e in zip(ours[:3], theirs[:3], strict=True)), "paths differ"
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-3, rtol=1e-3)


def cases(device: str) -> Iterator[Case]:
    for B, N, D, V in SHAPES if device == "cuda" else SHAPES[-1:]:
        for name, dtype in DTYPES.items():
            if name != "bf16" and (N, V) != (16, 32000):
                continue
            tensors = inputs(B, N, D, V, dtype, device)
            for rule, temperature in RULES.items():
                arguments = (*tensors, temperature)
                yield Case(
                    name=f"B{B}-N{N}-D{D}-V{V}-{name}-{rule}",
                    providers={
                        "eager": functools.partial(eager, *arguments),
                        "specfuse": functools.partial(fused, *arguments),
                    },
                    check=functools.partial(check, *arguments),
                    bytes=(V + B * N) * D * dtype.itemsize,
                    flops=2 * B * N * V * D,
                    sizes={"M": B * N, "V": V, "D": D, "itemsize": dtype.itemsize},
                    small=D <= 256,
                )


def tunings(device: str) -> Iterator[Tuning]:
    """Tiles by the number of rows; each in two depths of the pipeline."""
    for B, N, D, V in SHAPES[:4]:
        arguments = (*inputs(B, N, D, V, torch.bfloat16, device), 1.0)
        rows = min(128, max(16, B * N))
        configs = [
            {"BLOCK_M": m, "BLOCK_V": v, "BLOCK_D": 64, "num_warps": warps, "num_stages": stages}
            for m in sorted({min(rows, 64), rows})
            for v in (64, 128, 256)
            for warps in (4, 8)
            for stages in (3, 4)
        ]
        yield Tuning(
            sizes={"M": B * N, "V": V, "itemsize": 2},
            configs=configs,
            call=functools.partial(fused, *arguments),
            check=functools.partial(check, *arguments),
        )


def pytest_generate_tests(metafunc: Any) -> None:
    parametrize(metafunc, cases)


def test_bench_lm_head_verify(benchmark: Any, case: Callable[[], Case], provider: str) -> None:
    run_case(benchmark, case, provider)


if __name__ == "__main__":
    main(__doc__, cases)
