"""compact_kv against eager PyTorch and torch.compile, on the CPU or on CUDA.

    python benchmarks/bench_compact_kv.py [--device cuda] [--no-compile] [--json]
    pytest benchmarks/bench_compact_kv.py          # the same calls under pytest-benchmark

`eager` is an indexed copy per tensor, as one writes it where path and length are known on the host and equal
in all rows; it is compared with the op first. `bytes` is what has to move, read and written.
"""

from __future__ import annotations

from typing import Any

import torch
from timing import Calls, interleaved_us, parser, report
from torch import Tensor

from specfuse.ops import compact_kv

# Layers, B, G, Smax, D: LLaMA-7B at batch 1 and 8, a model with 8 kv heads, a small one.
SHAPES = [(32, 1, 32, 2304, 128), (4, 8, 32, 1024, 128), (32, 1, 8, 2304, 128), (4, 1, 4, 256, 64)]
PATHS = {"3 moved": [0, 2, 5, 9], "in place": [0, 1, 2, 3], "8 moved": [0, *range(8, 24, 2)]}


def case(L: int, B: int, G: int, Smax: int, D: int, path: list[int], device: str) -> tuple[list[Tensor], ...]:
    kv = [torch.randn(B, G, Smax, D, dtype=torch.float16, device=device) for _ in range(2 * L)]
    rows = torch.tensor([path + [-1] * (32 - len(path))] * B, dtype=torch.int32, device=device)
    length = torch.full((B,), len(path), dtype=torch.int32, device=device)
    return kv, [rows, length, torch.full((B,), Smax - 64, device=device)]


def eager(kv: list[Tensor], index: Tensor, start: int) -> None:
    for t in kv:
        t[:, :, start + 1 : start + 1 + index.numel()] = t[:, :, index]


def check(kv: list[Tensor], tensors: list[Tensor], path: list[int], start: int) -> None:
    some = [t.clone() for t in kv[:2]]
    expected = [t.clone() for t in some]
    eager(expected, torch.tensor(path[1:], device=kv[0].device) + start, start)
    compact_kv(some, *tensors)
    assert all(torch.equal(a, e) for a, e in zip(some, expected, strict=True))


def calls(kv: list[Tensor], tensors: list[Tensor], path: list[int], start: int, compiled: bool) -> Calls:
    providers: Calls = {"specfuse": lambda: compact_kv(kv, *tensors)}
    index = torch.tensor(path[1:], device=kv[0].device) + start  # a graph cannot capture a host tensor
    providers["eager"] = lambda: eager(kv, index, start)
    if compiled:
        function = torch.compile(eager, fullgraph=True)
        providers["compile"] = lambda: function(kv, index, start)
    return providers


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    cases: list[dict[str, object]] = []
    for L, B, G, Smax, D in SHAPES:
        for name, path in PATHS.items():
            kv, tensors = case(L, B, G, Smax, D, path, args.device)
            check(kv, tensors, path, Smax - 64)
            compiled = not args.no_compile and (L, B) == (4, 1) and name == "3 moved"
            times = interleaved_us(calls(kv, tensors, path, Smax - 64, compiled), args.device, args.rounds)
            moved = sum(node != slot for slot, node in enumerate(path))
            size = 2 * moved * L * B * G * D * kv[0].element_size() * 2  # keys and values, read and written
            cases.append({"case": f"L{L}-B{B}-G{G}-D{D}-{name}", "times": times, "bytes": size})
    report(cases, args)


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("provider", ["eager", "specfuse"])
    metafunc.parametrize("name", PATHS)


def test_compact_kv(benchmark: Any, provider: str, name: str) -> None:
    kv, tensors = case(*SHAPES[3], PATHS[name], "cpu")
    check(kv, tensors, PATHS[name], SHAPES[3][3] - 64)
    benchmark(calls(kv, tensors, PATHS[name], SHAPES[3][3] - 64, compiled=False)[provider])


if __name__ == "__main__":
    main()
