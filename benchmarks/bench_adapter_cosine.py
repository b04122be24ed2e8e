"""adapter_cosine: adapter, cosine similarity and threshold fused, against the eager module.

Eager is ``torch.nn.functional.cosine_similarity(adapter(x), target) >= threshold``; compile is the same code
under torch.compile (max-autotune on CUDA). bfloat16 on CUDA, float32 on a CPU, where the op is the eager
reference and nothing is gained. Bytes: weights, x and target once, score and decision. Flops: the products.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness import Case, Tuning, main, parametrize, run_case

from specfuse.adapters import LightweightAdapter, LinearAdapter, ResidualMLPAdapter
from specfuse.ops.adapter_cosine import adapter_cosine

THRESHOLD = 0.5
KINDS = {"linear": LinearAdapter, "mlp": ResidualMLPAdapter, "light": LightweightAdapter}
SIZES = [
    *(("light", *size) for size in ((1, 4096, 256), (16, 4096, 256), (64, 4096, 1024), (1024, 4096, 256))),
    *(("light", *size) for size in ((4096, 4096, 1024), (1, 150528, 512), (16, 150528, 512))),
    *(("light", 1024, 150528, 512), ("mlp", 16, 4096, 1024), ("mlp", 4096, 4096, 1024)),
    *(("linear", 16, 4096, 4096), ("linear", 1024, 4096, 4096)),
]
# Few rows, many rows, many columns: an autotuned compilation of each takes a good part of a minute.
COMPILED = {("light", 16, 4096, 256), ("light", 4096, 4096, 1024), ("light", 16, 150528, 512)}
SMALL = {("light", 1, 4096, 256), ("light", 16, 4096, 256), ("linear", 16, 4096, 4096)}


class Problem:
    """An adapter with random weights, features, and targets near its output."""

    def __init__(self, kind: str, M: int, D: int, R: int, device: str) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        made = KINDS[kind]
        self.adapter = (made(D, device=device) if kind == "linear" else made(D, R, device=device)).to(dtype)
        for parameter in self.adapter.parameters():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        self.adapter.requires_grad_(False)
        self.x = torch.randn(M, D, device=device, dtype=dtype)
        self.target = (self.adapter(self.x) + torch.randn_like(self.x)).to(dtype)
        size = dtype.itemsize
        products = sum(p.numel() for p in self.adapter.parameters() if p.dim() == 2)
        weights = sum(p.numel() for p in self.adapter.parameters())
        self.bytes = size * (weights + 2 * M * D) + 5 * M
        self.flops = 2 * M * products

    def eager(self) -> tuple[torch.Tensor, torch.Tensor]:
        score = F.cosine_similarity(self.adapter(self.x), self.target)
        return score, score >= THRESHOLD

    def specfuse(self) -> tuple[torch.Tensor, torch.Tensor]:
        result = adapter_cosine(self.x, self.adapter, self.target, THRESHOLD)
        return result.score, result.accept

    def check(self) -> None:
        """Both scores of up to 64 rows lie near float32 (rows do not depend on each other)."""
        rows = slice(0, 64)
        adapter = copy.deepcopy(self.adapter).float()
        truth = F.cosine_similarity(adapter(self.x[rows].float()), self.target[rows].float())
        fused, accept = self.specfuse()
        allowed = 2 * (self.eager()[0][rows].float() - truth).abs().max() + 1e-5
        error = (fused[rows] - truth).abs().max()
        assert error <= allowed, f"score is {error:.2e} from float32, eager allows {allowed:.2e}"
        assert torch.equal(accept, fused >= THRESHOLD)


def cases(device: str) -> Iterator[Case]:
    for kind, M, D, R in SIZES:
        small = (kind, M, D, R) in SMALL
        if device == "cpu" and not small:
            continue  # 300 MB of weights for a case that is not run
        problem = Problem(kind, M, D, R, device)
        yield Case(
            name=f"{kind}-M{M}-D{D}-R{R}-{str(problem.x.dtype)[6:]}",
            providers={"eager": problem.eager, "specfuse": problem.specfuse},
            check=problem.check,
            bytes=problem.bytes,
            flops=problem.flops,
            sizes={"M": M, "D": D, "R": R},
            small=small,
            compile=problem.eager if (kind, M, D, R) in COMPILED else None,
            compile_mode="max-autotune" if device == "cuda" else "default",
        )


def tunings(device: str) -> Iterator[Tuning]:
    """The lightweight adapter's sizes, with a few whole configurations each."""
    from specfuse.kernels import tuned

    for kind, M, D, R in SIZES:
        if kind != "light":
            continue
        problem = Problem(kind, M, D, R, device)
        base = tuned.config("adapter_cosine", {"M": M, "D": D, "R": R})
        configs = [base | down | up | _middle(M, down["SPLITS"]) for down in _downs(M) for up in _ups(M)]
        yield Tuning({"M": M, "D": D, "R": R}, configs, problem.specfuse, problem.check)


def _downs(M: int) -> list[dict[str, int]]:
    """Tiles of the down projection: few rows need many programs, many rows need large tiles."""
    names = ("DOWN_M", "DOWN_N", "DOWN_K", "SPLITS", "DOWN_WARPS", "DOWN_STAGES")
    if M <= 16:
        rows = [
            (16, 32, 128, 16, 4, 4),
            (16, 16, 128, 8, 4, 4),
            (16, 32, 128, 8, 4, 5),
            (16, 64, 128, 32, 4, 4),
        ]
    elif M <= 64:
        rows = [(64, 64, 64, 8, 4, 4), (64, 32, 64, 4, 4, 4), (64, 64, 64, 16, 4, 4), (32, 64, 64, 4, 4, 4)]
    else:
        rows = [(128, 256, 64, splits, 8, 3) for splits in (1, 4, 8)]
        rows += [(128, 128, 64, splits, 8, 3) for splits in (1, 4, 8)]
    return [dict(zip(names, row, strict=True)) for row in rows]


def _ups(M: int) -> list[dict[str, int]]:
    names = ("UP_M", "UP_N", "UP_K", "UP_PROGRAMS", "UP_WARPS", "UP_STAGES")
    if M <= 16:
        rows = [(16, 64, 64, 528, 4, 6), (16, 64, 128, 528, 4, 4), (16, 128, 64, 264, 4, 4)]
    elif M <= 64:
        rows = [(64, 64, 64, 264, 4, 4), (64, 64, 64, 528, 4, 4), (64, 128, 64, 132, 4, 3)]
    else:
        rows = [(128, 256, 64, 132, 8, 3), (128, 128, 64, 264, 8, 3), (128, 128, 64, 132, 8, 4)]
    return [dict(zip(names, row, strict=True)) for row in rows]


def _middle(M: int, splits: int) -> dict[str, int]:
    """The sums of all splits of one middle tile are in registers at once: the more, the smaller the tile."""
    if M <= 64:
        return {"MID_N": 32, "MID_K": 32 if splits <= 16 else 16, "MID_WARPS": 4, "MID_STAGES": 2}
    if splits == 1:
        return {"MID_N": 128, "MID_K": 64, "MID_WARPS": 8, "MID_STAGES": 3}
    return {"MID_N": 64, "MID_K": 16, "MID_WARPS": 8, "MID_STAGES": 2}


def pytest_generate_tests(metafunc: Any) -> None:
    parametrize(metafunc, cases)


def test_bench_adapter_cosine(benchmark: Any, case: Any, provider: str) -> None:
    run_case(benchmark, case, provider)


if __name__ == "__main__":
    main(__doc__, cases)
