"""``verify_tree``: C++ == eager reference == plain-Python oracle, its edge cases, and its registration."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from verify_tree_cases import (
    FILTERED,
    SAMPLED,
    arguments,
    assert_same,
    chain,
    leaning,
    parent_arrays,
    random_tree,
    verify_oracle,
)

from specfuse.kernels.philox_ref import uniform
from specfuse.kernels.verify_tree_ref import filter_logits, verify_tree_ref
from specfuse.ops import native, verify_tree
from specfuse.tree import TokenTree

op = torch.ops.specfuse.verify_tree.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE_IDS = ["fp32", "fp16", "bf16"]
INF = math.inf


# ---------------------------------------------------------------- the definition


def test_a_worked_example() -> None:
    """Root 0 with children 1 and 2; 2 has children 3 and 4. The target says 2, then 4, then 7."""
    tree = TokenTree.from_parents([[0, 1, 2, 3, 4]], [[-1, 0, 0, 2, 2]])
    logits = leaning([2, 9, 4, 9, 7], 10).unsqueeze(0)
    accepted = verify_tree(logits, tree)
    assert accepted.path.tolist() == [[0, 2, 4, -1, -1]]
    assert accepted.length.tolist() == [3]
    assert accepted.next_token.tolist() == [7]
    expected = logits[0, [0, 2, 4]].log_softmax(-1).max(-1).values
    torch.testing.assert_close(accepted.logprobs[0], torch.cat((expected, torch.zeros(2))))


@pytest.mark.parametrize("N", [1, 2, 3, 4, 5])
def test_every_greedy_walk_of_every_small_tree(N: int) -> None:
    """All parent arrays x drafted tokens x target tokens, over a vocabulary of three (two with 5 nodes)."""
    V = 2 if N == 5 else 3
    rows = list(product(parent_arrays(N), product(range(V), repeat=N - 1), product(range(V), repeat=N)))
    parents = torch.tensor([row[0] for row in rows], dtype=torch.int32)
    tokens = torch.tensor([(0, *row[1]) for row in rows])
    targets = torch.tensor([row[2] for row in rows])
    logits = torch.nn.functional.one_hot(targets, V).float()
    path, length, next_token, _ = op(*arguments(logits, tokens, parents))
    walks = [_walk(*row) for row in rows]
    assert [p[:n] for p, n in zip(path.tolist(), length.tolist(), strict=True)] == walks
    assert next_token.tolist() == [row[2][walk[-1]] for row, walk in zip(rows, walks, strict=True)]
    assert ((path >= 0).sum(1) == length).all()


def _walk(parents: tuple[int, ...], drafts: tuple[int, ...], targets: tuple[int, ...]) -> list[int]:
    nodes = [0]
    while True:
        fits = [
            c
            for c in range(1, len(parents))
            if parents[c] == nodes[-1] and drafts[c - 1] == targets[nodes[-1]]
        ]
        if not fits:
            return nodes
        nodes.append(fits[0])


@pytest.mark.parametrize("rule", [SAMPLED, FILTERED], ids=["sampled", "filtered"])
@pytest.mark.parametrize("N", [2, 3, 4, 5])
def test_every_small_tree_sampled(N: int, rule: dict[str, float]) -> None:
    """All parent arrays x tokens without duplicate siblings, vocabulary of three, random logits."""
    V = 3
    rows = [
        (p, t)
        for p, t in product(parent_arrays(N), product(range(V), repeat=N - 1))
        if len({(a, b) for a, b in zip(p[1:], t, strict=True)}) == N - 1
    ] * (20 if N < 4 else 1)
    parents = torch.tensor([p for p, _ in rows], dtype=torch.int32)
    tokens = torch.tensor([(0, *t) for _, t in rows])
    logits = torch.randn(len(rows), N, V, generator=torch.Generator().manual_seed(N))
    args = arguments(logits, tokens, parents, **rule)
    expected = verify_oracle(*args)
    assert expected[1].max() > 1  # walks do descend
    assert_same(op(*args), expected)
    assert_same(verify_tree_ref(*args), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    B=st.integers(0, 3),
    N=st.sampled_from([1, 2, 7, 31, 64, 67]),
    V=st.sampled_from([1, 2, 5, 63, 64, 65, 131]),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([0.0, 1e-3, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 40]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    scale=st.sampled_from([0.0, 0.5, 4.0, 200.0]),
)
def test_random_trees(
    seed: int, B: int, N: int, V: int, dtype: torch.dtype, scale: float, **rule: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(B, N, V, generator=generator) * scale).to(dtype)
    tokens, parents = random_tree(generator, B, N, V)
    num_nodes = torch.randint(0, N + 1, (B,), generator=generator, dtype=torch.int32)
    args = arguments(logits, tokens, parents, num_nodes, positions=seed, seed=torch.arange(B) - seed, **rule)
    expected = verify_oracle(*args)
    assert_same(op(*args), expected)
    assert_same(verify_tree_ref(*args), expected)


@pytest.mark.parametrize("rule", [{"temperature": 0.0}, SAMPLED, FILTERED, {**SAMPLED, "top_p": 0.95}])
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0], ids=["flat", "normal", "peaked"])
def test_a_real_vocabulary(rule: dict[str, float], spread: float) -> None:
    """32,003 tokens: the sizes at which the C++ partial selections and the noise bound do their work."""
    logits = torch.randn(12, 1, 32003, generator=torch.Generator().manual_seed(1)) * spread
    tokens, parents = torch.zeros(12, 1, dtype=torch.int64), torch.full((12, 1), -1, dtype=torch.int32)
    args = arguments(logits, tokens, parents, positions=torch.arange(12) * 1000, **rule)
    assert_same(op(*args), verify_tree_ref(*args))


@pytest.mark.skipif(native.cpu is None, reason="the C++ module is not built")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """Enough logits that a thread is worth starting, walks of different lengths."""
    generator = torch.Generator().manual_seed(3)
    B, N, V = 37, 5, 32003
    tokens, parents = random_tree(generator, B, N, V)
    logits = torch.randn(B, N, V, generator=generator)
    logits[:, :, :4] += 12.0  # drafts come true
    args = arguments(logits, tokens, parents, temperature=0.7, top_p=0.9)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 3, 64):
            torch.set_num_threads(threads)
            outputs.append(op(*args))
    finally:
        torch.set_num_threads(before)
    assert outputs[0][1].max() > 2, "walks go on"
    for output in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], output, strict=True))


@pytest.mark.skipif(native.cpu is None, reason="the C++ module is not built")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets_agree(isa: str) -> None:
    """The comparisons with a real vocabulary again, in a process that leaves AVX-512 or AVX2 unused."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "real_vocabulary",
    ]
    environment = {**os.environ, "SPECFUSE_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "12 passed" in result.stdout, result.stdout + result.stderr


# ---------------------------------------------------------------- filters


@pytest.mark.parametrize("top_k", [0, 1, 3, 200])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.4])
def test_kept_tokens_are_those_of_transformers(top_k: int, top_p: float, min_p: float) -> None:
    z = torch.randn(20, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2
    warped = z
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1.0:
        warped = TopPLogitsWarper(top_p)(None, warped)
    if min_p:
        warped = MinPLogitsWarper(min_p)(None, warped)
    kept = torch.stack([filter_logits(row, top_k, top_p, min_p) for row in z])
    assert torch.equal(kept, warped)


@pytest.mark.parametrize(
    ("logits", "rule", "kept"),
    [
        ([0.0, 0.0, 0.0, 0.0], {"top_p": 0.5}, {0, 1}),  # the mass before a token decides, ids break ties
        ([0.0, 0.0, 0.0, 0.0], {"top_p": 0.01}, {0}),
        ([3.0, 1.0, 1.0, 0.0], {"top_k": 2}, {0, 1, 2}),  # ties with the k-th stay
        ([2.0, 2.0, 1.0, -INF], {"min_p": 1.0}, {0, 1}),
        ([0.0, -INF, -INF, 0.0], {"top_k": 3}, {0, 3}),
        ([5.0, 5.0, 5.0, 5.0], {"top_k": 1, "top_p": 0.75}, {0, 1, 2}),
        # Weights that round to equal ones are no ties.
        ([1.0, 4.0, 2.0, 3.0], {"top_p": 0.4, "temperature": 1e30}, {1, 3}),
        ([1.0, 4.0, 4.0, 3.0], {"min_p": 1.0, "temperature": 1e30}, {1, 2}),
    ],
)
def test_what_filters_keep_in_ties(logits: list[float], rule: dict[str, float], kept: set[int]) -> None:
    """With 400 seeds every kept token is drawn, and no other; all kept weights here are equal but one."""
    rows = torch.tensor(logits).expand(400, 1, 4)
    args = arguments(
        rows, torch.zeros(400, 1, dtype=torch.int64), torch.full((400, 1), -1, dtype=torch.int32),
        **{"temperature": 1.0, **rule},
    )  # fmt: skip
    drawn = op(*args)[2]
    assert set(drawn.tolist()) == kept
    assert torch.equal(drawn, verify_tree_ref(*args)[2])


# ---------------------------------------------------------------- logits of every kind


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    "rule", [{"temperature": 0.0}, SAMPLED, FILTERED], ids=["greedy", "sampled", "filtered"]
)
def test_views_give_what_copies_give(dtype: torch.dtype, rule: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(4, 18, 75, 2, generator=generator).to(dtype)
    views = {
        "rows and nodes sliced": base[1:4, ::2, :70, 0].contiguous()[:, 1:8],
        "vocabulary strided": base[1:4, 2:9, :70, 1],
        "vocabulary outermost": base[:3, :7, :70, 0].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "one row for all": base[:1, :7, :70, 0].expand(3, 7, 70),
    }
    tokens, parents = random_tree(generator, 3, 7, 70)
    for name, view in views.items():
        args = arguments(view, tokens, parents, **rule)
        assert_same(op(*args), op(view.contiguous(), *args[1:])), name


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_half_precision_is_read_exactly(dtype: torch.dtype) -> None:
    """Every bit pattern of the dtype as a logit: the largest wins, and its log-probability is right."""
    if dtype == torch.float32:
        values = torch.tensor([1.0, 1.0 + 2**-23, -1e38, 1e-45, 3.4e38, 0.0])
    else:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[values.isfinite()]
    for batch in (values, values.flip(0), values[values.abs() < 1e-4], values[values < 0]):
        if batch.numel():
            args = arguments(
                batch.reshape(1, 1, -1), torch.zeros(1, 1, dtype=torch.int64), -torch.ones(1, 1).int()
            )
            assert_same(op(*args), verify_oracle(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_greedy_ties_go_to_the_lowest_id(dtype: torch.dtype) -> None:
    for V, ids in [(5, [1, 3]), (200, [64, 65, 190]), (130, [129]), (300, [0, 299])]:
        logits = torch.full((1, 1, V), -2.0, dtype=dtype)
        logits[..., ids] = 1.5
        accepted = verify_tree(logits, TokenTree.from_parents([[0]], [[-1]]))
        assert accepted.next_token.item() == ids[0]
    zeros = torch.tensor([[[-1.0, -0.0, 0.0]]], dtype=dtype)  # -0.0 == 0.0
    assert verify_tree(zeros, TokenTree.from_parents([[0]], [[-1]])).next_token.item() == 1


def test_sampled_ties_go_to_the_lowest_id() -> None:
    """Two tokens of equal noise and logit, alone and beside a likelier token with less noise."""
    u = uniform(torch.tensor(3), torch.tensor(1), torch.arange(32000))
    values, counts = u.unique(return_counts=True)
    twins = [(u == value).nonzero().flatten().tolist() for value in values[(counts == 2) & (values > 0.9)]]
    assert len(twins) >= 2
    unlucky = int(u.argmin())
    for first, second in twins:
        logits = torch.full((1, 1, 32000), -INF)
        logits[..., [first, second]] = 0.0
        args = arguments(logits, torch.zeros(1, 1).long(), -torch.ones(1, 1).int(), temperature=1.0, seed=3)
        assert op(*args)[2].item() == verify_tree_ref(*args)[2].item() == first
        logits[..., unlucky] = 1.0  # is looked at first, and loses
        assert op(*args)[2].item() == verify_tree_ref(*args)[2].item() == first


def test_float64_is_rounded_to_float32() -> None:
    logits = torch.tensor([[[1.0, 1.0 + 1e-12]]], dtype=torch.float64)
    assert verify_tree(logits, TokenTree.from_parents([[0]], [[-1]])).next_token.item() == 0


@pytest.mark.parametrize("V", [3, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    "rule", [{"temperature": 0.0}, SAMPLED, FILTERED], ids=["greedy", "sampled", "filtered"]
)
def test_rows_without_a_distribution_are_reported(V: int, dtype: torch.dtype, rule: dict[str, float]) -> None:
    """NaN anywhere, only -inf, or +inf when sampling: the walk stops there, with -1 and NaN."""
    nan_last, nan_first, dead, infinite = (torch.zeros(2, V, dtype=dtype) for _ in range(4))
    nan_last[1, V - 1], nan_first[1, 0], dead[1], infinite[1, 2] = math.nan, math.nan, -INF, INF
    sampled = rule["temperature"] > 0
    for broken in (nan_last, nan_first, dead, *([infinite] if sampled else [])):
        broken[0] = -INF
        broken[0, 1] = 0.0  # the root accepts node 1, whose row is the broken one
        accepted = verify_tree(*chain([0, 1], broken), **rule)
        assert accepted.length.item() == 2 and accepted.next_token.item() == -1
        assert accepted.logprobs[0, 0].item() == 0.0 and accepted.logprobs[0, 1].isnan()
        accepted = verify_tree(*chain([0, 1], broken.flip(0)), **rule)
        assert accepted.length.item() == 1 and accepted.next_token.item() == -1
    if not sampled:
        assert verify_tree(*chain([0], infinite[1:]), **rule).next_token.item() == 2


def test_a_broken_row_that_is_not_visited_does_no_harm() -> None:
    logits = leaning([3, 1], 5)
    logits[1] = math.nan
    accepted = verify_tree(*chain([0, 2], logits))
    assert accepted.next_token.item() == 3 and accepted.length.item() == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_an_impossible_token_is_never_emitted(temperature: float) -> None:
    """A drafted token with logit -inf is not accepted for any of 2,000 seeds."""
    logits = torch.tensor([[0.0, -INF, 0.0], [0.0, 0.0, 0.0]]).expand(2000, 2, 3)
    tree = TokenTree.from_chains([0] * 2000, [[1]] * 2000)
    accepted = verify_tree(logits, tree, temperature=temperature)
    assert set(accepted.next_token.tolist()) == {0, 2}
    assert (accepted.length == 1).all()
