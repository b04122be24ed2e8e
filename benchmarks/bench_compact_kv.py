"""compact_kv against eager PyTorch and torch.compile, on the CPU or on CUDA.

`eager` is an indexed copy per tensor, as one writes it where path and length are known on the host and equal
in all rows; `compile` is torch.compile of it. Counted are the bytes that have to move, read and written: the
slots whose place in the path is not their place in the tree. Calls repeat on the same cache: what is moved
changes, how much does not. "in place" moves nothing: what it takes is the cost of the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Case, main, parametrize, run_case
from torch import Tensor

from specfuse.ops import compact_kv

# Layers, B, G, Smax, D: LLaMA-7B at batch 1, 8 and 16, 8 kv heads, four layers, a small model.
SHAPES = [
    (32, 1, 32, 2304, 128),
    (32, 8, 32, 1024, 128),
    (32, 16, 32, 1024, 128),
    (32, 1, 8, 2304, 128),
    (4, 8, 32, 1024, 128),
    (4, 1, 4, 256, 64),
]
PATHS = {
    "in-place": [0, 1, 2, 3],
    "3-moved": [0, 2, 5, 9],
    "8-moved": [0, *range(8, 24, 2)],
    "16-moved": [0, *range(2, 34, 2)],
}
SLOTS = 64  # of the tree


def eager(kv: list[Tensor], index: Tensor, start: int) -> None:
    for t in kv:
        t[:, :, start + 1 : start + 1 + index.numel()] = t[:, :, index]


def check(kv: list[Tensor], arguments: list[Tensor], index: Tensor, start: int) -> None:
    """The op and the eager code move the same slots of the first two and the last tensor."""
    ours = [t[:, :, start:].clone() for t in (*kv[:2], kv[-1])]
    theirs = [t.clone() for t in ours]
    eager(theirs, index - start, 0)
    path, length, _ = arguments
    compact_kv(ours, path, length, torch.zeros_like(length))
    assert all(torch.equal(a, e) for a, e in zip(ours, theirs, strict=True))


def case(L: int, B: int, G: int, Smax: int, D: int, name: str, device: str) -> Case:
    kv = [torch.randn(B, G, Smax, D, dtype=torch.float16, device=device) for _ in range(2 * L)]
    nodes, start = PATHS[name], Smax - SLOTS
    path = torch.tensor([nodes + [-1] * (SLOTS - len(nodes))] * B, dtype=torch.int32, device=device)
    length = torch.full((B,), len(nodes), dtype=torch.int32, device=device)
    arguments = [path, length, torch.full((B,), start, device=device)]
    index = torch.tensor(nodes[1:], device=device) + start  # a graph cannot capture a host tensor
    run: Callable[[], None] = functools.partial(eager, kv, index, start)
    moved = sum(node != slot for slot, node in enumerate(nodes))
    return Case(
        name=f"L{L}-B{B}-G{G}-D{D}-{name}",
        providers={"eager": run, "specfuse": lambda: compact_kv(kv, *arguments)},
        check=functools.partial(check, kv, arguments, index, start),
        bytes=2 * moved * 2 * L * B * G * D * kv[0].element_size(),
        sizes={"L": L, "B": B, "G": G, "D": D, "moved": moved},
        small=L * B * G <= 256,
        # One graph of 64 copies takes torch.compile a minute; four layers tell as much per tensor.
        compile=run if L <= 4 and name == "8-moved" else None,
    )


def cases(device: str) -> Iterator[Case]:
    for shape in SHAPES:
        if device == "cuda" or shape[0] * shape[1] * shape[2] <= 256:
            for name in PATHS:
                yield case(*shape, name, device)


def pytest_generate_tests(metafunc: Any) -> None:
    parametrize(metafunc, cases)


def test_bench_compact_kv(benchmark: Any, case: Callable[[], Case], provider: str) -> None:
    run_case(benchmark, case, provider)


if __name__ == "__main__":
    main(__doc__, cases)
