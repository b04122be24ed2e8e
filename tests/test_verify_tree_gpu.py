"""``verify_tree`` on a CUDA device: strategies, large offsets, graphs, streams."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from verify_tree_cases import FILTERED, SAMPLED, arguments, assert_same, random_tree

from specfuse.kernels import tuned
from specfuse.kernels.philox_ref import gumbel
from specfuse.ops import verify_tree
from specfuse.tree import TokenTree

pytestmark = pytest.mark.gpu
op = torch.ops.specfuse.verify_tree.default

RULES = {"greedy": {"temperature": 0.0}, "sampled": SAMPLED, "filtered": FILTERED}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
STRATEGIES = {
    "walk": (0, 1),
    "walk-cluster8": (0, 8),
    "scan": (1, 1),
    "scan-split8": (8, 4),
    "scan-split32": (32, 2),
}


@pytest.fixture(params=STRATEGIES.values(), ids=STRATEGIES.keys(), autouse=True)
def strategy(request: pytest.FixtureRequest):
    splits, cluster = request.param
    with tuned.override("verify_tree", {"splits": splits, "cluster": cluster}):
        yield request.param


def forest(B: int, N: int, V: int, dtype: torch.dtype, rule: dict[str, float]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(V)
    tokens, parents = random_tree(generator, B, N, V)
    logits = (torch.randn(B, N, V, generator=generator) * 3).to(dtype)
    logits[:, 0, 1] = 40.0  # most walks leave the root
    num_nodes = torch.full((B,), N, dtype=torch.int32)
    num_nodes[B // 2] = 0
    return arguments(logits, tokens, parents, num_nodes, positions=2**33, **rule)


def on_cuda(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.cuda() for t in args)


@rules
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("V", [1, 9, 2100, 32000, 32003, 262144])
def test_equals_cpu(V: int, dtype: torch.dtype, rule: dict[str, float]) -> None:
    args = forest(3, 7, V, dtype, rule)
    assert_same(op(*on_cuda(args)), op(*args))


def test_filters_that_cut_through_ties() -> None:
    """Flat rows and few values: what top-p keeps among equal tokens is decided by their ids."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randint(-2, 2, (64, 1, 32001), generator=generator).float()
    logits[::3] = 1.5
    args = arguments(
        logits, torch.zeros(64, 1).long(), -torch.ones(64, 1).int(), temperature=0.9,
        top_k=[0, 1, 200, 32000] * 16, top_p=[1.0, 0.999, 0.7, 0.01] * 16, min_p=[0.0, 0.3] * 32,
    )  # fmt: skip
    assert_same(op(*on_cuda(args)), op(*args))


def test_two_scores_a_rounding_error_apart() -> None:
    """Logits that cancel the noise to 1e-7: only the draw in double agrees with the CPU in every row."""
    B = 4000
    noise = gumbel(torch.arange(B).unsqueeze(1), torch.tensor(1), torch.tensor([[2, 5]]))
    logits = torch.full((B, 1, 8), -math.inf)
    logits[:, 0, 2] = 0.0
    logits[:, 0, 5] = (noise[:, 0] - noise[:, 1]).float()
    args = arguments(logits, torch.zeros(B, 1).long(), -torch.ones(B, 1).int(), temperature=1.0)
    assert_same(op(*on_cuda(args)), op(*args))


@rules
def test_the_widest_trees(rule: dict[str, float]) -> None:
    args = forest(2, 1024, 509, torch.bfloat16, rule)
    assert_same(op(*on_cuda(args)), op(*args))


def test_a_chain_as_long_as_the_tree() -> None:
    tokens = torch.arange(1024).unsqueeze(0) % 7
    logits = torch.zeros(1, 1024, 1000)
    logits[0, torch.arange(1023), tokens[0, 1:]] = 50.0
    tree = TokenTree.from_chains([0], [tokens[0, 1:].tolist()])
    accepted = verify_tree(logits.cuda(), TokenTree(*(t.cuda() for t in tree[:3])), temperature=0.5)
    assert accepted.length.item() == 1024 and accepted.path.tolist() == [list(range(1024))]


def test_offsets_past_32_bits() -> None:
    """B * N * V > 2**31 elements with a vocabulary of 262,144: the last row is read where it lies."""
    B, N, V = 9, 1024, 262144
    if torch.cuda.mem_get_info()[0] < 2 * B * N * V + 2**30:
        pytest.skip("needs 6 GB of free GPU memory")
    logits = torch.zeros(B, N, V, dtype=torch.bfloat16, device="cuda")
    logits[:, :-1, 5] = 1.0
    logits[8, 1023, 262143] = 1.0
    tree = TokenTree.from_chains([0] * B, [[5] * (N - 1)] * B)
    accepted = verify_tree(logits, TokenTree(*(t.cuda() for t in tree[:3])))
    assert accepted.length.tolist() == [N] * B and accepted.next_token.tolist() == [0] * 8 + [262143]


@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_rows_without_a_distribution(broken: float) -> None:
    for rule in RULES.values():
        args = forest(3, 5, 32003, torch.float32, rule)
        args[0][0, 0], args[0][2, 0, 32002] = (broken if broken < 0 else 0.0), broken
        args[0][0, 0, 31000] = broken
        assert_same(op(*on_cuda(args)), op(*args))


def test_an_infinite_temperature_has_no_distribution() -> None:
    args = on_cuda(forest(3, 5, 1000, torch.float32, {"temperature": math.inf}))
    assert op(*args)[2].tolist() == [-1, -1, -1]


# ---------------------------------------------------------------- graphs and streams


@rules
def test_a_captured_graph_follows_its_inputs(rule: dict[str, float]) -> None:
    args = forest(4, 16, 32000, torch.bfloat16, rule)
    held = on_cuda(args)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        op(*held)  # loads modules before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = op(*held)
    for seed in range(5):
        args[0].copy_(torch.randn(args[0].shape, generator=torch.Generator().manual_seed(seed)) * 4)
        args[8].copy_(torch.arange(4) + seed)
        for graph_side, host_side in zip(held, args, strict=True):
            graph_side.copy_(host_side)
        graph.replay()
        graph.replay()  # nothing of one replay is left for the next
        assert_same(outputs, op(*args))


def test_two_streams_do_not_meet() -> None:
    problems = [forest(4, 16, 32000, torch.bfloat16, rule) for rule in RULES.values()]
    expected = [op(*args) for args in problems]
    held = [on_cuda(args) for args in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(30):
        results = []
        for stream, args in zip(streams, held, strict=True):
            with torch.cuda.stream(stream):
                results.append(op(*args))
        torch.cuda.synchronize()
        for actual, right in zip(results, expected, strict=True):
            assert_same(actual, right)
