"""The Triton kernels of adapter_cosine under the interpreter, against float64 and the reference."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from adapter_cosine_cases import EPS, KINDS, assert_as_good_as_eager, inputs

from specfuse.kernels import adapter_cosine as launcher
from specfuse.kernels import tuned
from specfuse.kernels.adapter_cosine import adapter_cosine_triton
from specfuse.kernels.adapter_cosine_ref import adapter_cosine_ref

SHIPPED = json.loads((Path(tuned.__file__).parent / "configs" / "adapter_cosine.json").read_text())["entries"]
CONFIGS = {str(entry["config"]): entry for entry in SHIPPED}.values()
TILES = {"DOWN_M": 16, "DOWN_N": 16, "DOWN_K": 32, "SPLITS": 4, "DOWN_WARPS": 4, "DOWN_STAGES": 2}
TILES |= {"MID_M": 16, "MID_N": 16, "MID_K": 32, "MID_WARPS": 4, "MID_STAGES": 2}
TILES |= {"UP_M": 16, "UP_N": 32, "UP_K": 16, "UP_PROGRAMS": 5, "UP_WARPS": 4, "UP_STAGES": 2}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}

kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What no kernel writes is NaN, a counter nobody zeroed is -1."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        t = empty(*args, **kwargs)
        return t.fill_(-1 if t.dtype == torch.int32 else math.nan)

    monkeypatch.setattr("specfuse.kernels.adapter_cosine.torch.empty", poisoned)
    yield


@dtypes
@pytest.mark.parametrize(("kind", "splits"), [("linear", 1), *itertools.product(KINDS[1:], (1, 4))])
@pytest.mark.parametrize(
    ("M", "D", "R"), [(1, 31, 15), (2, 32, 16), (15, 33, 17), (16, 128, 64), (17, 101, 37), (33, 161, 31)]
)
def test_sizes_around_the_tiles(kind: str, dtype: torch.dtype, splits: int, M: int, D: int, R: int) -> None:
    case = inputs(kind, M, D, R, dtype)
    with tuned.override("adapter_cosine", TILES | {"SPLITS": splits}):
        result = adapter_cosine_triton(*case, 0.25, EPS, True)
    assert_as_good_as_eager(result, *case, 0.25)


@pytest.mark.parametrize("entry", CONFIGS, ids=lambda e: "-".join(f"{k}{v}" for k, v in e["sizes"].items()))
def test_shipped_configurations(entry: dict) -> None:
    # Multiples of 16, else the launcher takes small tiles; but of no tile.
    case = inputs("lightweight", 19, 528, 80, torch.float16)
    with tuned.override("adapter_cosine", entry["config"]):
        result = adapter_cosine_triton(*case, 0.0, EPS, True)
    assert_as_good_as_eager(result, *case, 0.0)


@kinds
def test_one_feature_and_one_hidden_unit(kind: str) -> None:
    case = inputs(kind, 3, 1, 1, torch.float32)
    with tuned.override("adapter_cosine", TILES):
        assert_as_good_as_eager(adapter_cosine_triton(*case, 0.0, EPS, True), *case, 0.0)


@kinds
def test_slices_of_larger_tensors(kind: str) -> None:
    """Only the slice is read: around it all is NaN."""
    x, weights, target = inputs(kind, 17, 45, 20, torch.float32)
    wide_x, wide_target = torch.full((40, 99), math.nan), torch.full((34, 60), math.nan)
    wide_x[3:20, 7:52], wide_target[::2, :45] = x, target
    views = (wide_x[3:20, 7:52], weights, wide_target[::2, :45])
    with tuned.override("adapter_cosine", TILES):
        expected = adapter_cosine_triton(x, weights, target, 0.1, EPS, True)
        sliced = adapter_cosine_triton(*views, 0.1, EPS, True)
        columns = adapter_cosine_triton(x.t().contiguous().t(), weights, target, 0.1, EPS, True)
    for other in (sliced, columns):
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


def test_linear_between_widths() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(67, 29, generator=generator), torch.randn(67, generator=generator)]
    case = (torch.randn(5, 29, generator=generator), weights, torch.randn(5, 67, generator=generator))
    with tuned.override("adapter_cosine", TILES):
        assert_as_good_as_eager(adapter_cosine_triton(*case, 0.0, EPS, True), *case, 0.0)


@kinds
def test_nan_zero_and_empty_rows(kind: str) -> None:
    x, weights, target = inputs(kind, 18, 40, 24, torch.float32)
    threshold = -0.5
    x[2, 5], target[4, 0], target[17] = math.nan, math.nan, 0.0
    with tuned.override("adapter_cosine", TILES):
        score, accept, _ = adapter_cosine_triton(x, weights, target, threshold, EPS, False)
        none = adapter_cosine_triton(x[:0], weights, target[:0], 0.0, EPS, True)
    expected = adapter_cosine_ref(x, weights, target, threshold, EPS)
    assert score.isnan().nonzero().flatten().tolist() == [2, 4]
    assert accept.tolist() == expected[1].tolist() and not accept[2] and not accept[4]
    assert score[17] == 0.0 and accept[17]
    torch.testing.assert_close(score, expected[0], equal_nan=True, atol=1e-6, rtol=0)
    assert [tuple(t.shape) for t in none] == [(0,), (0,), (0, 40)]


def test_nan_inside_the_adapter_is_not_hidden_by_its_relu() -> None:
    x, weights, target = inputs("lightweight", 3, 40, 24, torch.float32)
    for index in (0, 4):
        broken = [w.clone() for w in weights]
        broken[index][7, 3] = math.nan
        with tuned.override("adapter_cosine", TILES):
            score, accept, _ = adapter_cosine_triton(x, broken, target, -1.0, EPS, False)
        assert score.isnan().all() and not accept.any()


def test_groups_and_tiles_of_rows_do_not_change_the_decision() -> None:
    """Counters per row block: with several row blocks and several groups each block is finished once."""
    case = inputs("lightweight", 50, 130, 40, torch.float32)
    for programs, splits in ((1, 4), (4, 1), (100, 8)):
        forced = TILES | {"UP_PROGRAMS": programs, "SPLITS": splits, "DOWN_M": 32, "UP_M": 32}
        with tuned.override("adapter_cosine", forced):
            result = adapter_cosine_triton(*case, 0.1, EPS, True)
            without = adapter_cosine_triton(*case, 0.1, EPS, False)
        assert_as_good_as_eager(result, *case, 0.1)
        assert torch.equal(without[0], result[0]) and without[2].shape == (0, 130)


@pytest.mark.parametrize(
    ("kind", "splits", "launches"),
    [
        ("linear", 4, ["up_kernel", "score_kernel"]),
        ("residual_mlp", 1, ["down_kernel", "up_kernel"]),
        ("residual_mlp", 4, ["down_kernel", "activate_kernel", "up_kernel"]),
        ("lightweight", 1, ["down_kernel", "middle_kernel", "up_kernel"]),
        ("lightweight", 4, ["down_kernel", "middle_kernel", "up_kernel"]),
    ],
)
def test_at_most_three_launches(
    kind: str, splits: int, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(launcher, name)

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            seen.append(self.name)
            return self.kernel[grid]

    names = ("down_kernel", "middle_kernel", "activate_kernel", "up_kernel", "score_kernel")
    for counted in [Counted(name) for name in names]:
        monkeypatch.setattr(launcher, counted.name, counted)
    case = inputs(kind, 5, 40, 24, torch.float32)
    with tuned.override("adapter_cosine", TILES | {"SPLITS": splits}):
        assert_as_good_as_eager(adapter_cosine_triton(*case, 0.0, EPS, True), *case, 0.0)
    assert seen == launches
