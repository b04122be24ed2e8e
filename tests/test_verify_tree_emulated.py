"""The device code of ``verify_tree`` on the CPU, under the emulator in tests/cuda_emulator."""

from __future__ import annotations

import json
import math
from itertools import product
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from emulated import FLAGS, build_op, needs_compiler, poison, run_sanitized
from torch import Tensor
from verify_tree_cases import FILTERED, SAMPLED, arguments, assert_same, leaning, random_tree

from specfuse.kernels import tuned
from specfuse.kernels.philox_ref import gumbel, uniform
from specfuse.kernels.verify_tree_ref import verify_tree_ref
from specfuse.ops.verify_tree import _native_call, _scratch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RULES = {"greedy": {"temperature": 0.0}, "sampled": SAMPLED, "filtered": FILTERED}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
pytestmark = needs_compiler


class Mode(NamedTuple):
    splits: int  # blocks per row of a scan of all rows; 0 = rows are read when visited
    cluster: int  # blocks per tree of the walk
    order: str  # in which the emulator runs blocks, warps and lanes


MODES = {
    "walk": Mode(0, 1, "forward"),
    "walk-cluster2": Mode(0, 2, "1"),
    "walk-cluster8": Mode(0, 8, "reverse"),
    "scan": Mode(1, 1, "reverse"),
    "scan-split4": Mode(4, 2, "forward"),
    "scan-split8": Mode(8, 4, "2"),
}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return build_op("verify_tree", tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=MODES.values(), ids=MODES.keys())
def mode(request: pytest.FixtureRequest) -> Mode:
    return request.param


def verify(emulated: ModuleType, mode: Mode, *args: Tensor) -> tuple[Tensor, ...]:
    call, outputs, _inputs = _native_call(args[0], args[1:])
    scratch = _scratch(emulated, args[0], mode.splits, mode.cluster)
    poison(*outputs, scratch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_EMULATOR_ORDER", mode.order)
        emulated.verify_tree(*call, mode.splits, mode.cluster, scratch.data_ptr(), 0)
    return outputs


def forest(V: int, dtype: torch.dtype, rule: dict[str, float]) -> tuple[Tensor, ...]:
    """Four trees, one of them empty."""
    generator = torch.Generator().manual_seed(V)
    tokens, parents = random_tree(generator, 4, 9, V)
    logits = (torch.randn(4, 9, V, generator=generator) * 3).to(dtype)
    num_nodes = torch.tensor([9, 0, 1, 6], dtype=torch.int32)
    return arguments(logits, tokens, parents, num_nodes, positions=2**33 + 5, **rule)


@dtypes
@rules
def test_every_type_and_rule(
    emulated: ModuleType, mode: Mode, dtype: torch.dtype, rule: dict[str, float]
) -> None:
    args = forest(131, dtype, rule)
    assert_same(verify(emulated, mode, *args), verify_tree_ref(*args))


@pytest.mark.parametrize("mode", [MODES["walk"], MODES["walk-cluster2"], MODES["scan-split4"]],
                         ids=["walk", "walk-cluster2", "scan-split4"])  # fmt: skip
@pytest.mark.parametrize("V", [1, 7, 8, 9, 2100])
def test_vocabularies_around_a_load(emulated: ModuleType, mode: Mode, V: int) -> None:
    turn = V + mode.cluster
    for rule, dtype in zip(RULES.values(), [*DTYPES.values()] * 2, strict=False):
        args = forest(V, [*DTYPES.values()][turn % 3] if V > 100 else dtype, rule)
        assert_same(verify(emulated, mode, *args), verify_tree_ref(*args))


@rules
@pytest.mark.parametrize("mode", [MODES["walk-cluster8"], Mode(32, 2, "1")], ids=["walk", "scan"])
def test_a_real_vocabulary(emulated: ModuleType, mode: Mode, rule: dict[str, float]) -> None:
    logits = (torch.randn(1, 2, 32000, generator=torch.Generator().manual_seed(1)) * 2).bfloat16()
    chain = torch.tensor([[-1, 0]], dtype=torch.int32)
    args = arguments(logits, torch.zeros(1, 2, dtype=torch.int64), chain, **rule)
    args[1][0, 1] = verify_tree_ref(*args)[2].item()  # the draft that is accepted
    expected = verify_tree_ref(*args)
    assert expected[1].item() == 2
    assert_same(verify(emulated, mode, *args), expected)


def test_rows_of_one_batch_follow_their_own_rules(emulated: ModuleType, mode: Mode) -> None:
    generator = torch.Generator().manual_seed(0)
    B, N, V = 24, 3, 23
    tokens, parents = random_tree(generator, B, N, V)
    logits = (torch.randn(B, N, V, generator=generator) * 2).round()  # with ties
    logits[torch.rand(logits.shape, generator=generator) < 0.2] = -math.inf
    pick = lambda values: torch.tensor(values)[torch.randint(0, len(values), (B,), generator=generator)]  # noqa: E731
    args = arguments(
        logits, tokens, parents, temperature=pick([0.0, 0.5, 1.0, 2.0]), top_k=pick([0, 1, 3, 40]),
        top_p=pick([1.0, 0.9, 0.5, 0.05]), min_p=pick([0.0, 0.1, 1.0]), seed=torch.arange(B) - 7,
    )  # fmt: skip
    assert_same(verify(emulated, mode, *args), verify_tree_ref(*args))


@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_rows_without_a_distribution(emulated: ModuleType, mode: Mode, broken: float) -> None:
    for rule in RULES.values():
        logits = torch.full((1, 2, 70), -math.inf)
        logits[0, 0, 1] = 0.0
        logits[0, 1] = broken if broken < 0 else 0.0
        logits[0, 1, 69] = broken
        chain = torch.tensor([[-1, 0]], dtype=torch.int32)
        args = arguments(logits, torch.tensor([[0, 1]]), chain, **rule)
        assert_same(verify(emulated, mode, *args), verify_tree_ref(*args))


@pytest.mark.parametrize("temperature", [math.inf, math.nan, -1.0])
def test_temperatures_out_of_range_emit_nothing(emulated: ModuleType, mode: Mode, temperature: float) -> None:
    """A tensor on a GPU is not read on the host: nothing refuses its values."""
    path, length, next_token, logprobs = verify(
        emulated, mode, *forest(40, torch.float32, {"temperature": temperature})
    )
    assert length.tolist() == [1, 0, 1, 1] and next_token.tolist() == [-1] * 4
    assert logprobs[[0, 2, 3], 0].isnan().all() and (path[:, 1:] == -1).all()


@dtypes
def test_greedy_ties_go_to_the_lowest_id(emulated: ModuleType, mode: Mode, dtype: torch.dtype) -> None:
    """Ties within a load, across lanes, warps, loads and blocks."""
    ties = [[1, 3], [5, 6, 7], [3, 4], [31, 33], [300, 900], [8, 4097], [2500, 4999], [0, 4999], [4998, 4999]]
    logits = torch.full((len(ties), 1, 5000), -2.0, dtype=dtype)
    for row, ids in enumerate(ties):
        logits[row, 0, ids] = 1.5
    args = arguments(logits, torch.zeros(len(ties), 1).long(), -torch.ones(len(ties), 1).int())
    assert verify(emulated, mode, *args)[2].tolist() == [ids[0] for ids in ties]


# ---------------------------------------------------------------- draws and filters that are close


@pytest.mark.parametrize("temperature", [1e-37, 1e-3, 1.0])
def test_scores_that_float32_cannot_tell_apart(emulated: ModuleType, mode: Mode, temperature: float) -> None:
    """Large logits with small differences: every draw is repeated in double."""
    logits = 3e6 + torch.randint(0, 8, (6, 1, 300), generator=torch.Generator().manual_seed(3)) * 0.25
    args = arguments(logits, torch.zeros(6, 1).long(), -torch.ones(6, 1).int(), temperature=temperature)
    assert_same(verify(emulated, mode, *args), verify_tree_ref(*args))


def test_two_scores_a_rounding_error_apart(emulated: ModuleType) -> None:
    """Logits that cancel the noise to 1e-7: float32 noise alone would pick the wrong token in many rows."""
    B = 400
    noise = gumbel(torch.arange(B).unsqueeze(1), torch.tensor(1), torch.tensor([[2, 5]]))
    logits = torch.full((B, 1, 8), -math.inf)
    logits[:, 0, 2] = 0.0
    logits[:, 0, 5] = (noise[:, 0] - noise[:, 1]).float()
    args = arguments(logits, torch.zeros(B, 1).long(), -torch.ones(B, 1).int(), temperature=1.0)
    expected = verify_tree_ref(*args)
    in_float32 = torch.where(
        logits[:, 0, 2] + noise[:, 0].float() >= logits[:, 0, 5] + noise[:, 1].float(), 2, 5
    )
    assert (in_float32 != expected[2]).sum() > 20
    assert_same(verify(emulated, MODES["walk"], *args), expected)


@pytest.mark.parametrize("mode", [MODES["walk"], MODES["scan"]], ids=["walk", "scan"])
def test_draws_beyond_the_first_iteration(emulated: ModuleType, mode: Mode) -> None:
    """Ten iterations per thread: what an earlier one drew decides which noise later ones skip."""
    logits = torch.randn(24, 1, 40001, generator=torch.Generator().manual_seed(8))
    logits *= torch.tensor([0.0, 1.0, 3.0, 6.0]).repeat(6).view(24, 1, 1)
    args = arguments(logits, torch.zeros(24, 1).long(), -torch.ones(24, 1).int(), temperature=1.0)
    assert_same(verify(emulated, mode, *args), verify_tree_ref(*args))


def test_tokens_of_equal_noise_and_logit(emulated: ModuleType, mode: Mode) -> None:
    u = uniform(torch.tensor(3), torch.tensor(1), torch.arange(8000))
    values, counts = u.unique(return_counts=True)
    first, second = (u == values[counts == 2][-1]).nonzero().flatten().tolist()
    logits = torch.full((1, 1, 8000), -math.inf)
    logits[..., [first, second]] = 0.0
    args = arguments(logits, torch.zeros(1, 1).long(), -torch.ones(1, 1).int(), temperature=1.0, seed=3)
    assert verify(emulated, mode, *args)[2].item() == verify_tree_ref(*args)[2].item() == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_filters_that_cut_through_ties(emulated: ModuleType, mode: Mode, dtype: torch.dtype) -> None:
    """Few values and flat rows: top-p ends between equal tokens, top-k keeps all of them."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randint(-2, 2, (24, 1, 257), generator=generator).to(dtype)
    logits[::3] = 1.5
    rows = list(product([0, 1, 200], [1.0, 0.999, 0.7, 0.01], [0.0, 0.3]))
    top_k, top_p, min_p = zip(*rows, strict=True)
    args = arguments(
        logits, torch.zeros(24, 1).long(), -torch.ones(24, 1).int(), temperature=0.9,
        top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    assert_same(verify(emulated, mode, *args), verify_tree_ref(*args))


def test_ties_beyond_two_million_tokens(emulated: ModuleType) -> None:
    """Ids then have three digits; one value for all, so that the id alone decides what top-p keeps."""
    logits = torch.zeros(1, 1, 1).expand(1, 1, 2**21 + 5)
    args = arguments(logits, torch.zeros(1, 1).long(), -torch.ones(1, 1).int(), temperature=1.0, top_p=2e-6)
    expected = verify_tree_ref(*args)
    assert expected[2].item() < 5
    assert_same(verify(emulated, MODES["walk-cluster2"], *args), expected)


# ---------------------------------------------------------------- trees and views


@pytest.mark.parametrize("mode", [MODES["walk-cluster2"], MODES["scan"]], ids=["walk", "scan"])
def test_wide_trees_and_strided_vocabularies(emulated: ModuleType, mode: Mode) -> None:
    """A chain of 40 accepted drafts, then 983 siblings: more than there are threads in a block."""
    N = 1024
    generator = torch.Generator().manual_seed(N)
    base = torch.randn(1, N, 9, 2, generator=generator)
    tokens = torch.randint(0, 9, (1, N), generator=generator)
    base[0, torch.arange(40), tokens[0, 1:41], 1] = 60.0
    parents = torch.arange(-1, N - 1).clamp(max=40).int().unsqueeze(0)
    args = arguments(base[..., 1], tokens, parents, temperature=1.0)
    expected = verify_tree_ref(*args)
    assert expected[1] == 42
    assert_same(verify(emulated, mode, *args), expected)


@dtypes
@pytest.mark.parametrize("start", [1, 3, 4, 8])
def test_rows_at_any_alignment(emulated: ModuleType, dtype: torch.dtype, start: int) -> None:
    """Rows of 333 tokens within rows of 351: each begins elsewhere within 16 bytes."""
    base = torch.randn(3, 5, 351, generator=torch.Generator().manual_seed(start)).to(dtype)
    tokens, parents = random_tree(torch.Generator().manual_seed(start), 3, 5, 333)
    for mode, rule in zip(
        [MODES["walk-cluster2"], MODES["scan"], MODES["scan-split4"]], RULES.values(), strict=True
    ):
        args = arguments(base[:, :, start : start + 333], tokens, parents, **rule)
        assert_same(verify(emulated, mode, *args), verify_tree_ref(*args))


@pytest.mark.parametrize(("B", "N"), [(0, 3), (2, 0)])
def test_empty_problems(emulated: ModuleType, mode: Mode, B: int, N: int) -> None:
    args = arguments(torch.zeros(B, N, 5), torch.zeros(B, N).long(), torch.zeros(B, N).int())
    path, length, next_token, logprobs = verify(emulated, mode, *args)
    assert path.shape == logprobs.shape == (B, N)
    assert length.tolist() == [0] * B and next_token.tolist() == [-1] * B


def test_every_configuration_of_the_file_runs(emulated: ModuleType) -> None:
    entries = json.loads(tuned.config_file("verify_tree", None).read_text())["entries"]
    chosen = {tuple(entry["config"].values()) for entry in entries}
    args = arguments(leaning([3, 1], 9).unsqueeze(0), torch.tensor([[0, 3]]), torch.tensor([[-1, 0]]).int())
    assert len(chosen) > 3
    for splits, cluster in chosen:
        assert_same(verify(emulated, Mode(splits, cluster, "1"), *args), verify_tree_ref(*args))


def test_strategies_out_of_range_are_refused(emulated: ModuleType) -> None:
    args = forest(9, torch.float32, {})
    for splits, cluster, message in [(3, 1, "splits must"), (64, 1, "splits must"), (1, 16, "cluster must")]:
        with pytest.raises(RuntimeError, match=message):
            verify(emulated, Mode(splits, cluster, "forward"), *args)


@pytest.mark.slow
@pytest.mark.skipif(bool(FLAGS), reason="this process has the sanitizers already")
def test_no_read_or_write_out_of_bounds() -> None:
    """Some of this file again under the address and undefined-behaviour sanitizers."""
    chosen = "(every_type and cluster2 and (fp32 or bf16)) or (any_alignment and fp16) or wide"
    output = run_sanitized("tests/test_verify_tree_emulated.py", "-k", chosen)
    assert "12 passed" in output, output[-3000:]
