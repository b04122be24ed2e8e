"""``adapter_cosine``: reference against float64 and eager modules, the contract, CUDA against float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adapter_cosine_cases import EPS, KINDS, assert_as_good_as_eager, compare, inputs
from torch import Tensor

from specfuse.adapters import LightweightAdapter, LinearAdapter, ResidualMLPAdapter
from specfuse.kernels import tuned
from specfuse.kernels.adapter_cosine_ref import adapter_cosine_ref, align_ref
from specfuse.ops.adapter_cosine import (
    LightweightWeights,
    LinearWeights,
    ResidualMLPWeights,
    adapter_cosine,
)

op = torch.ops.specfuse.adapter_cosine.default
TUPLES = {"linear": LinearWeights, "residual_mlp": ResidualMLPWeights, "lightweight": LightweightWeights}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def module(kind: str, D: int, R: int) -> torch.nn.Module:
    made = {
        "linear": lambda: LinearAdapter(D),
        "residual_mlp": lambda: ResidualMLPAdapter(D, R),
        "lightweight": lambda: LightweightAdapter(D, R),
    }[kind]()
    for parameter in made.parameters():  # an untrained adapter is the identity and would show little
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@kinds
@dtypes
@pytest.mark.parametrize(("M", "D", "R"), [(1, 5, 3), (17, 101, 37)])
def test_reference_is_as_good_as_eager(kind: str, dtype: torch.dtype, M: int, D: int, R: int) -> None:
    case = inputs(kind, M, D, R, dtype)
    result = adapter_cosine(case[0], TUPLES[kind](*case[1]), case[2], 0.3, return_aligned=True)
    assert_as_good_as_eager(result, *case, 0.3)


def test_the_comparison_sees_a_wrong_score() -> None:
    case = inputs("lightweight", 17, 101, 37, torch.float16)
    score, accept, aligned = op(*case, 0.3, EPS, True)
    wrong_score = score + 0.01
    for wrong in (
        (wrong_score, wrong_score >= 0.3, aligned),
        (score, ~accept, aligned),
        (score, accept, aligned + 0.05),
        (score, accept, torch.full_like(aligned, math.nan)),
    ):
        with pytest.raises(AssertionError):
            assert_as_good_as_eager(wrong, *case, 0.3)


@kinds
@torch.no_grad()
def test_equals_the_module_and_cosine_similarity(kind: str) -> None:
    adapter = module(kind, 31, 8)
    x, target = torch.randn(9, 31), torch.randn(9, 31)
    result = adapter_cosine(x, adapter, target, 0.05, return_aligned=True)
    expected = F.cosine_similarity(adapter(x), target, eps=EPS)
    torch.testing.assert_close(result.score, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(result.aligned, adapter(x))
    assert result.accept.tolist() == (expected >= 0.05).tolist()
    assert adapter_cosine(x, adapter, target, 0.05).aligned is None


@torch.no_grad()
def test_linear_between_widths() -> None:
    adapter = LinearAdapter(12, 20)
    x, target = torch.randn(4, 12), torch.randn(4, 20)
    result = adapter_cosine(x, adapter, target, 0.0, return_aligned=True)
    torch.testing.assert_close(result.score, F.cosine_similarity(adapter(x), target), atol=1e-6, rtol=0)
    assert result.aligned.shape == (4, 20)


@kinds
def test_zero_nan_and_no_rows(kind: str) -> None:
    x, weights, target = inputs(kind, 5, 12, 4, torch.float32)
    target[0], target[1, 3], x[2, 7] = 0.0, math.nan, math.nan
    score, accept, _ = op(x, weights, target, -0.5, EPS, False)
    assert score[0] == 0.0 and accept[0]
    assert score.isnan().tolist() == [False, True, True, False, False] and accept[1:3].tolist() == [False] * 2
    empty = op(x[:0], weights, target[:0], 0.0, EPS, True)
    assert [tuple(t.shape) for t in empty] == [(0,), (0,), (0, 12)] and empty[1].dtype == torch.bool


def test_the_threshold_itself_is_accepted() -> None:
    weights = [torch.eye(2), torch.zeros(2)]
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    score, accept, _ = op(x, weights, torch.tensor([[2.0, 0.0]]).repeat(3, 1), 0.0, EPS, False)
    assert score.tolist() == [1.0, 0.0, -1.0] and accept.tolist() == [True, True, False]


GOOD = dict(zip(("x", "weights", "target"), inputs("lightweight", 3, 10, 4, torch.float32), strict=True))
GOOD |= {"threshold": 0.5, "eps": EPS, "return_aligned": False}


def replaced(index: int, tensor: Tensor) -> dict[str, list[Tensor]]:
    return {"weights": [tensor if i == index else w for i, w in enumerate(GOOD["weights"])]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 11)}, r"x must be \[3, 10\] torch.float32 on cpu, got \[3, 11\]"),
        ({"x": torch.zeros(3, 10, dtype=torch.float16)}, "x must be .*float16"),
        ({"x": torch.zeros(3, 10, device="meta")}, "x must be .* on cpu, got .* on meta"),
        ({"target": torch.zeros(10)}, r"target must be \[M, D\] .*, got \[10\]"),
        ({"target": torch.zeros(3, 10, dtype=torch.float64)}, "target must be .*float64"),
        ({"target": torch.zeros(3, 0)}, r"target must be .* got \[3, 0\]"),
        ({"weights": GOOD["weights"][:3]}, "weights must be 2, 4 or 10 tensors, got 3"),
        (replaced(4, torch.zeros(4, 5)), r"weights.middle must be \[4, 4\] .* got \[4, 5\]"),
        (replaced(8, torch.zeros(4, 10)), r"weights.up must be \[10, 4\] .* got \[4, 10\]"),
        (replaced(0, torch.zeros(0, 10)), r"weights.down must be \[1, 10\]"),
        ({"weights": [torch.zeros(10, 7), torch.zeros(10)]}, r"weights.weight must be \[10, 10\]"),
        ({"threshold": 1.5}, r"threshold must lie in \[-1, 1\], got 1.5"),
        ({"threshold": math.nan}, "threshold must lie"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(*(GOOD | changes).values())


def test_an_adapter_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adapter must be a module of specfuse.adapters .* got Linear"):
        adapter_cosine(GOOD["x"], torch.nn.Linear(10, 10), GOOD["target"], 0.5)


@kinds
@pytest.mark.parametrize("return_aligned", [False, True])
def test_opcheck(kind: str, return_aligned: bool) -> None:
    torch.library.opcheck(op, (*inputs(kind, 5, 12, 4, torch.float32), 0.5, EPS, return_aligned))


@kinds
@torch.no_grad()
def test_compiled_equals_eager(kind: str) -> None:
    adapter = module(kind, 12, 4)
    x, target = torch.randn(5, 12), torch.randn(5, 12)

    def step(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        score, accept, aligned = adapter_cosine(x * 2, adapter, target, 0.1, return_aligned=True)
        return score * accept, aligned + 1

    expected = step(x, target)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(x, target)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("needs", ["x", "target", "weight"])
def test_autograd_is_refused_by_name(needs: str) -> None:
    x, weights, target = inputs("lightweight", 3, 10, 4, torch.float32)
    {"x": x, "target": target, "weight": weights[4]}[needs].requires_grad_()
    adapter = LightweightWeights(*weights)
    with pytest.raises(RuntimeError, match=r"LightweightAdapter.*torch.no_grad"):
        adapter_cosine(x, adapter, target, 0.5)
    with torch.no_grad():
        expected = adapter_cosine_ref(x, weights, target, 0.5, EPS)[0]
        assert torch.equal(adapter_cosine(x, adapter, target, 0.5).score, expected)
    with torch.inference_mode():
        assert torch.equal(adapter_cosine(x, adapter, target, 0.5).score, expected)


# ---------------------------------------------------------------- on a GPU

CONFIGS = json.loads((Path(tuned.__file__).parent / "configs" / "adapter_cosine.json").read_text())["entries"]


def assert_rows_match(case: tuple[Tensor, list[Tensor], Tensor], rows: Tensor, aligned: bool) -> None:
    """Some rows of a large case against float64: rows do not depend on each other."""
    x, weights, target = case
    score, accept, y = op(x, weights, target, 0.3, EPS, aligned)
    some = (score[rows], accept[rows], y[rows] if aligned else None)
    assert_as_good_as_eager(some, x[rows], weights, target[rows], 0.3)
    assert torch.equal(accept, score >= 0.3)


@pytest.mark.gpu
@kinds
@dtypes
@pytest.mark.parametrize("M", [1, 15, 16, 17, 63, 129])
@pytest.mark.parametrize(("D", "R"), [(512, 256), (1031, 67)])
def test_cuda_against_float64(kind: str, dtype: torch.dtype, M: int, D: int, R: int) -> None:
    case = inputs(kind, M, D, R, dtype, "cuda")
    assert_rows_match(case, torch.arange(M, device="cuda"), aligned=True)


@pytest.mark.gpu
@pytest.mark.parametrize("entry", CONFIGS, ids=lambda e: "-".join(f"{k}{v}" for k, v in e["sizes"].items()))
def test_cuda_shipped_sizes(entry: dict[str, dict[str, int]]) -> None:
    M, D, R = entry["sizes"].values()
    case = inputs("lightweight", M, D, R, torch.bfloat16, "cuda")
    rows = torch.linspace(0, M - 1, min(M, 33), device="cuda").long().unique()
    assert_rows_match(case, rows, aligned=False)


@pytest.mark.gpu
def test_cuda_offsets_past_32_bits() -> None:
    """M * D > 2**31 elements: the last rows are read where they lie."""
    M, D, R = 14_300, 150_528, 16
    weights = inputs("residual_mlp", 1, D, R, torch.bfloat16, "cuda")[1]
    x, target = (torch.randn(M, D, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    rows = torch.tensor([0, 7000, M - 2, M - 1], device="cuda")
    assert_rows_match((x, weights, target), rows, aligned=True)


@pytest.mark.gpu
@kinds
def test_cuda_graph_replay_gives_the_same_bits(kind: str) -> None:
    x, weights, target = inputs(kind, 33, 2048, 256, torch.bfloat16, "cuda")
    second = torch.randn_like(x)
    eager = [op(v, weights, target, 0.3, EPS, False)[0] for v in (x, second)]
    graph, static = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        score = op(static, weights, target, 0.3, EPS, False)[0]
    for v, expected in ((x, eager[0]), (second, eager[1]), (x, eager[0])):
        static.copy_(v)
        graph.replay()
        assert torch.equal(score, expected)


@pytest.mark.gpu
def test_cuda_tensors_reach_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "specfuse.kernels.adapter_cosine.adapter_cosine_triton",
        lambda x, weights, target, *rest: (
            calls.append(rest) or adapter_cosine_ref(x, weights, target, 0.3, EPS)
        ),
    )
    case = inputs("linear", 4, 64, 8, torch.float32, "cuda")
    op(*case, 0.3, EPS, True)
    assert calls == [(0.3, EPS, True)]


@pytest.mark.gpu
def test_cuda_equals_cpu_in_float32() -> None:
    case = inputs("lightweight", 40, 777, 130, torch.float32)
    on_gpu = op(case[0].cuda(), [w.cuda() for w in case[1]], case[2].cuda(), 0.3, EPS, True)
    y = align_ref(case[0].double(), [w.double() for w in case[1]])
    compare("aligned", on_gpu[2].cpu(), align_ref(case[0], case[1]), y, 1e-6)
