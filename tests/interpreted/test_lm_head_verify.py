"""``lm_head_verify``'s kernels under Triton's interpreter: the reference's paths, and verify_tree's."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm_head_cases import RULES, Arguments, expected_paths, lm_head_arguments
from verify_tree_cases import assert_same

from specfuse.kernels import tuned
from specfuse.kernels.lm_head_verify import lm_head_verify
from specfuse.ops.verify_tree import _op as verify_tree_op

SMALL = {"BLOCK_M": 16, "BLOCK_V": 32, "BLOCK_D": 16, "num_warps": 4, "num_stages": 1}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
MIXED = RULES["mixed"]
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


@pytest.fixture(autouse=True)
def unwritten_shows() -> Iterator[None]:
    """New tensors are filled with NaN and the largest integers."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def run(arguments: Arguments) -> tuple[Tensor, ...]:
    with tuned.override("lm_head_verify", SMALL):
        return lm_head_verify(*arguments)


def by_verify_tree(arguments: Arguments) -> tuple[Tensor, ...]:
    hidden, weight, bias, tokens, parents, num_nodes, temperature, seed, positions = arguments
    logits = torch.nn.functional.linear(hidden, weight, bias)
    off = torch.zeros_like(temperature)
    filters = (torch.zeros_like(num_nodes), off + 1.0, off)
    return verify_tree_op(logits, tokens, parents, num_nodes, temperature, *filters, seed, positions)


def compare(arguments: Arguments, deep: int = 0) -> None:
    actual = run(arguments)
    assert_same(actual, expected_paths(arguments))
    assert_same(actual, by_verify_tree(arguments))
    assert max(actual[1].tolist(), default=0) >= deep


@dtypes
@rules
@pytest.mark.parametrize("V", [1, 31, 32, 33, 131])
def test_vocabularies_around_a_tile(dtype: torch.dtype, rule: list[float], V: int) -> None:
    compare(lm_head_arguments(3, 9, 32, V, dtype, rule), deep=3)


@dtypes
@pytest.mark.parametrize(("B", "N"), [(1, 1), (1, 15), (2, 8), (1, 17), (5, 7), (0, 4), (2, 0)])
def test_rows_around_a_tile(dtype: torch.dtype, B: int, N: int) -> None:
    compare(lm_head_arguments(B, N, 16, 67, dtype, MIXED, bias=True))


@dtypes
@pytest.mark.parametrize("D", [1, 15, 17, 48, 61])
def test_hidden_sizes_around_a_tile(dtype: torch.dtype, D: int) -> None:
    compare(lm_head_arguments(2, 5, D, 70, dtype, [0.7, 0.0]))


def test_untuned_configurations_of_every_size() -> None:
    for B, N in ((1, 16), (1, 33), (2, 40)):
        for dtype in (torch.float32, torch.float16):
            arguments = lm_head_arguments(B, N, 64, 300, dtype, [1.0], bias=True)
            assert_same(lm_head_verify(*arguments), expected_paths(arguments))


@dtypes
def test_views_and_padding(dtype: torch.dtype) -> None:
    """Strided states, a transposed head, and padding nodes that hold anything, NaN included."""
    arguments = list(lm_head_arguments(3, 9, 32, 50, dtype, [0.0, 0.9], num_nodes=[9, 4, 0]))
    wide = torch.full((3, 18, 2, 32), torch.nan, dtype=dtype)
    wide[:, ::2, 1] = arguments[0]
    for b, n in enumerate([9, 4, 0]):
        wide[b, 2 * n :: 2, 1] = torch.nan
        arguments[3][b, n:] = 2**40
        arguments[4][b, n:] = torch.tensor([2**30, -7, 8, 0, 3, 5, 7, 6, 8], dtype=torch.int32)[n:]
    arguments[0] = wide[:, ::2, 1]
    arguments[1] = arguments[1].t().contiguous().t()
    compare(tuple(arguments), deep=2)


@dtypes
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token", [0, 69])
def test_rows_without_a_distribution(dtype: torch.dtype, broken: float, token: int) -> None:
    hidden, weight, _, *rest = lm_head_arguments(3, 6, 16, 70, dtype, MIXED)
    bias = torch.zeros(70, dtype=dtype)
    bias[token] = broken
    compare((hidden, weight, bias, *rest))


@dtypes
def test_all_tokens_impossible_but_one(dtype: torch.dtype) -> None:
    """Whole tiles of -inf, then a row of nothing else."""
    hidden, weight, _, *rest = lm_head_arguments(3, 6, 16, 70, dtype, MIXED)
    bias = torch.full((70,), -math.inf, dtype=dtype)
    compare((hidden, weight, bias, *rest))
    bias[37] = 0.0
    compare((hidden, weight, bias, *rest))


def test_logits_are_rounded_to_the_storage_dtype() -> None:
    """1025 / 1024 and 1 are one number in float16 once they are multiplied by 2048: the lower id wins."""
    hidden = torch.tensor([[[2048.0, 1.0]]], dtype=torch.float16)
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.5]], dtype=torch.float16)
    one, root = torch.ones(1, dtype=torch.int32), torch.full((1, 1), -1, dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.int64)
    rest = (zero[None], root, one, torch.zeros(1), zero, zero)
    assert int(run((hidden, weight, None, *rest))[2]) == 0
    assert int(run((hidden.float(), weight.float(), None, *rest))[2]) == 1
    compare((hidden, weight, None, *rest))


def test_extreme_temperatures() -> None:
    compare(lm_head_arguments(4, 7, 16, 67, torch.float32, [1e-30, 1e-38, 1e4, 1e30]))
