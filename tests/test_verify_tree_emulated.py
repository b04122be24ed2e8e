"""The device code of ``verify_tree`` on the CPU, under the emulator in tests/cuda_emulator."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from emulated import ORDERS, build_op, needs_compiler, poison
from torch import Tensor
from verify_tree_cases import FILTERED, SAMPLED, arguments, assert_same, random_tree

from specfuse.kernels.verify_tree_ref import verify_tree_ref
from specfuse.ops.verify_tree import _native_call

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RULES = {"greedy": {"temperature": 0.0}, "sampled": SAMPLED, "filtered": FILTERED}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return build_op("verify_tree", tmp_path_factory.mktemp("emulated"))


def verify(emulated: ModuleType, *args: Tensor) -> tuple[Tensor, ...]:
    call, outputs, _inputs = _native_call(args[0], args[1:])
    poison(*outputs)
    emulated.verify_tree(*call, 0)
    return outputs


@pytest.fixture(params=ORDERS, autouse=True)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_EMULATOR_ORDER", request.param)


@dtypes
@pytest.mark.parametrize("V", [1, 130, 2100])
@rules
def test_verify_tree(emulated: ModuleType, dtype: torch.dtype, V: int, rule: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(V)
    tokens, parents = random_tree(generator, 4, 9, V)
    logits = (torch.randn(4, 9, V, generator=generator) * 3).to(dtype)
    num_nodes = torch.tensor([9, 0, 1, 6], dtype=torch.int32)
    args = arguments(logits, tokens, parents, num_nodes, positions=2**33 + 5, **rule)
    assert_same(verify(emulated, *args), verify_tree_ref(*args))


def test_verify_tree_rows_of_one_batch_follow_their_own_rules(emulated: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    B, N, V = 40, 3, 23
    tokens, parents = random_tree(generator, B, N, V)
    logits = (torch.randn(B, N, V, generator=generator) * 2).round()  # with ties
    logits[torch.rand(logits.shape, generator=generator) < 0.2] = -math.inf
    pick = lambda values: torch.tensor(values)[torch.randint(0, len(values), (B,), generator=generator)]  # noqa: E731
    args = arguments(
        logits, tokens, parents, temperature=pick([0.0, 0.5, 1.0, 2.0]), top_k=pick([0, 1, 3, 40]),
        top_p=pick([1.0, 0.9, 0.5, 0.05]), min_p=pick([0.0, 0.1, 1.0]), seed=torch.arange(B) - 7,
    )  # fmt: skip
    assert_same(verify(emulated, *args), verify_tree_ref(*args))


@rules
@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_verify_tree_without_a_distribution(
    emulated: ModuleType, rule: dict[str, float], broken: float
) -> None:
    logits = torch.full((1, 2, 70), -math.inf)
    logits[0, 0, 1] = 0.0
    logits[0, 1] = broken if broken < 0 else 0.0
    logits[0, 1, 69] = broken
    args = arguments(logits, torch.tensor([[0, 1]]), torch.tensor([[-1, 0]], dtype=torch.int32), **rule)
    assert_same(verify(emulated, *args), verify_tree_ref(*args))


def test_verify_tree_views_and_wide_trees(emulated: ModuleType) -> None:
    N = 700  # more nodes than threads in a block
    base = torch.randn(2, N, 9, 2)
    tokens = torch.randint(0, 9, (2, N))
    parents = torch.zeros(2, N, dtype=torch.int32)
    parents[:, 0] = -1
    args = arguments(base[..., 1], tokens, parents, temperature=1.0)
    assert_same(verify(emulated, *args), verify_tree_ref(*args))
