"""``verify_tree_rejection``: C++ == eager reference, known answers, and its edge cases."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from verify_tree_cases import FILTERED, SAMPLED, arguments, assert_same, random_tree, word_oracle
from verify_tree_rejection_cases import DTYPE_IDS, DTYPES, WITH, draw_tree, op_arguments, to_dense, to_sparse

from specfuse.kernels.philox_ref import COIN, RESIDUAL, TARGET, uniform
from specfuse.kernels.verify_tree_rejection_ref import verify_tree_rejection_ref
from specfuse.ops import native, verify_tree_rejection
from specfuse.tree import TokenTree

op = torch.ops.specfuse.verify_tree_rejection.default
verify_tree = torch.ops.specfuse.verify_tree.default
INF = math.inf
replacement = pytest.mark.parametrize("with_replacement", WITH.values(), ids=WITH.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
rules = pytest.mark.parametrize(
    "rule", [{"temperature": 0.0}, SAMPLED, FILTERED], ids=["greedy", "sampled", "filtered"]
)

# Root with three children, the first two with two of their own.
PARENTS = [-1, 0, 0, 0, 1, 1, 2, 2]


def one_row(p: list[list[float]], q: list[list[float]], tree: TokenTree, B: int = 1, **options: object):
    """The public op on B copies of a tree whose target distributions are p [N, V]."""
    logits = torch.tensor(p).log().expand(B, -1, -1)
    copies = TokenTree(*(t.expand(B, *t.shape[1:]).contiguous() for t in tree[:3]))
    return verify_tree_rejection(logits, copies, torch.tensor(q).expand(B, -1, -1), **options)


def random_case(
    generator: torch.Generator, B: int, N: int, V: int, closeness: float
) -> dict[str, torch.Tensor]:
    """Any tokens below any nodes, so that duplicates and drafts of q = 0 occur; q partly zero."""
    logits = torch.randn(B, N, V, generator=generator) * 2
    noise = torch.randn(B, N, V, generator=generator)
    q = (closeness * logits + (1 - closeness) * 2 * noise).softmax(-1)
    q = q * (torch.rand(q.shape, generator=generator) < 0.9)
    tokens, parents = random_tree(generator, B, N, V)
    return {"logits": logits, "q": q, "tokens": tokens, "parents": parents}


# ---------------------------------------------------------------- known answers


def test_a_worked_example() -> None:
    """p = (.5, .3, .2), q = (.1, .6, .3); the drafts are 1, then 2.

    Token 1 is accepted with probability .3 / .6. Otherwise p - q = (.4, -.3, -.1) leaves (1, 0, 0), and token
    2 has no chance: the emitted token is 0.
    """
    tree = TokenTree.from_parents([[7, 1, 2]], [[-1, 0, 0]])
    accepted = one_row([[0.5, 0.3, 0.2]] * 3, [[0.1, 0.6, 0.3]] * 3, tree, B=4000)
    coins = uniform(torch.arange(4000), torch.tensor(1), torch.tensor(0), COIN)
    took = coins < 0.5
    assert torch.equal(accepted.path[:, 1] == 1, took) and (accepted.length == 1 + took).all()
    assert (accepted.next_token[~took] == 0).all()
    expected = torch.where(took, torch.tensor(0.3).log(), torch.tensor(0.5).log())
    torch.testing.assert_close(accepted.logprobs[:, 0], expected)
    assert 0.45 < took.double().mean() < 0.55


def test_the_second_sibling_is_tested_against_what_is_left() -> None:
    """p = (.2, .2, .6), q = (.5, .25, .25), drafts 0, 2: what is left is (0, 0, 1), of q (0, .5, .5)."""
    tree = TokenTree.from_parents([[0, 0, 2]], [[-1, 0, 0]])
    accepted = one_row([[0.2, 0.2, 0.6]] * 3, [[0.5, 0.25, 0.25]] * 3, tree, B=500)
    assert set(accepted.path[:, 1].tolist()) == {1, 2}


@replacement
def test_q_is_rescaled_after_a_rejection(with_replacement: bool) -> None:
    """p = (.38, .12, .5), q = (.9, .08, .02): the rejection of draft 0 leaves of p (0, .08, .92).

    Without replacement it leaves of q (0, .8, .2), and draft 1 has a chance of 0.1; with replacement, of .96.
    """
    tree = TokenTree.from_parents([[9, 0, 1]], [[-1, 0, 0]])
    p, q = [[0.38, 0.12, 0.5]] * 3, [[0.9, 0.08, 0.02]] * 3
    accepted = one_row(p, q, tree, 2000, with_replacement=with_replacement)
    second = accepted.path[accepted.path[:, 1] != 1, 1] == 2
    assert len(second) > 1000
    low, high = (0.93, 0.99) if with_replacement else (0.07, 0.13)
    assert low < second.double().mean() < high


@replacement
def test_a_drafter_that_is_the_target_is_always_accepted(with_replacement: bool) -> None:
    """A first sibling drawn from q = p never fails, at any depth."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 4, 50, generator=generator)
    tokens, parents = draw_tree(logits.softmax(-1), [-1, 0, 1, 2], with_replacement, generator)
    args = op_arguments(logits, logits.softmax(-1), None, with_replacement, tokens, parents)
    assert (op(*args)[1] == 4).all()


@pytest.mark.parametrize("stream", [TARGET, COIN, RESIDUAL])
def test_native_noise_of_each_stream(stream: int) -> None:
    tokens = torch.tensor([0, 1, 5, 31999])
    u = uniform(torch.tensor(3), torch.tensor(2**33), tokens, stream)
    if native.cpu is not None:
        words = torch.tensor([native.cpu.noise_word(3, 2**33, t, stream) for t in tokens.tolist()])
        assert torch.equal(u, (words >> 8).double() * 2.0**-24)
    same = [(word_oracle(3, 2**33, t) >> 8) * 2.0**-24 for t in tokens.tolist()] == u.tolist()
    assert same == (stream == TARGET)


# ---------------------------------------------------------------- implementations agree


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    B=st.integers(0, 3),
    N=st.sampled_from([1, 2, 7, 31, 64]),
    V=st.sampled_from([1, 2, 5, 63, 64, 65, 131]),
    k=st.sampled_from([None, 0, 1, 3, 40]),
    dtype=st.sampled_from(DTYPES),
    draft_dtype=st.sampled_from(DTYPES),
    with_replacement=st.booleans(),
    closeness=st.sampled_from([0.0, 0.8, 1.0]),
    temperature=st.sampled_from([0.0, 1e-3, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 2, 40]),
    top_p=st.sampled_from([1.0, 0.5]),
    min_p=st.sampled_from([0.0, 0.05]),
)
def test_random_trees(
    seed: int, B: int, N: int, V: int, k: int | None, dtype: torch.dtype, draft_dtype: torch.dtype,
    with_replacement: bool, closeness: float, **rule: float,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    case = random_case(generator, B, N, V, closeness)
    q, ids = (case["q"], None) if k is None else to_sparse(case["q"], k)
    if ids is not None:
        ids = ids.where(torch.rand(ids.shape, generator=generator) < 0.9, -1)
    num_nodes = torch.randint(0, N + 1, (B,), generator=generator, dtype=torch.int32)
    args = op_arguments(
        case["logits"].to(dtype), q.to(draft_dtype), ids, with_replacement, case["tokens"], case["parents"],
        num_nodes, positions=seed, seed=torch.arange(B) - seed, **rule,
    )  # fmt: skip
    assert_same(op(*args), verify_tree_rejection_ref(*args))


@replacement
def test_deep_walks_agree(with_replacement: bool) -> None:
    """400 drafted trees, dense and sparse: most walks accept, many after a rejection."""
    generator = torch.Generator().manual_seed(1)
    case = random_case(generator, 400, len(PARENTS), 9, 0.8)
    q = case["q"] + 1e-4
    tokens, parents = draw_tree(q, PARENTS, with_replacement, generator)
    args = op_arguments(case["logits"], q, None, with_replacement, tokens, parents)
    expected = verify_tree_rejection_ref(*args)
    assert (expected[1] == 3).sum() > 30 and (expected[0][:, 1] > 1).sum() > 30
    assert_same(op(*args), expected)
    sparse = op_arguments(case["logits"], *to_sparse(q, 9), with_replacement, tokens, parents)
    assert_same(op(*sparse), expected)


@pytest.mark.parametrize("rule", [SAMPLED, FILTERED, {**SAMPLED, "top_p": 0.95}])
@pytest.mark.parametrize("k", [None, 64])
def test_a_real_vocabulary(rule: dict[str, float], k: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 8, 32003, generator=generator) * 3
    q = (logits + torch.randn(logits.shape, generator=generator)).softmax(-1)
    tokens, parents = draw_tree(q, PARENTS, False, generator)
    drafts = (q, None) if k is None else to_sparse(q, k)
    args = op_arguments(logits, *drafts, False, tokens, parents, **rule)
    assert_same(op(*args), verify_tree_rejection_ref(*args))


@rules
def test_sparse_is_the_dense_row_it_stands_for(rule: dict[str, float]) -> None:
    """Padding, in any place and of any sign, adds nothing; the order of the ids does not matter."""
    generator = torch.Generator().manual_seed(3)
    case = random_case(generator, 200, 7, 40, 0.7)
    values, ids = to_sparse(case["q"], 6)
    ids = ids.where(
        torch.rand(ids.shape, generator=generator) < 0.8, torch.tensor([-1, 40, -(2**40), 2**40, -1, 40])
    )
    dense = op_arguments(
        case["logits"], to_dense(values, ids, 40), None, False, case["tokens"], case["parents"], **rule
    )
    for order in (torch.arange(6), torch.tensor([5, 0, 4, 1, 3, 2])):
        sparse = (case["logits"], values[..., order], ids[..., order], False, *dense[4:])
        assert_same(op(*sparse), op(*dense))
        assert_same(verify_tree_rejection_ref(*sparse), op(*dense))


@dtypes
def test_views_give_what_copies_give(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.rand(4, 18, 75, 2, generator=generator).to(dtype)
    views = {
        "rows and nodes sliced": base[1:4, ::2, :70, 0].contiguous()[:, 1:8],
        "vocabulary strided": base[1:4, 2:9, :70, 1],
        "vocabulary outermost": base[:3, :7, :70, 0].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "one row for all": base[:1, :7, :70, 0].expand(3, 7, 70),
    }
    tokens, parents = random_tree(generator, 3, 7, 70)
    for view in views.values():
        args = op_arguments(view, view, None, False, tokens, parents)
        copies = (view.contiguous(), view.contiguous(), *args[2:])
        assert_same(op(*args), op(*copies))
        ids = (torch.arange(140)[::2] // 2).expand(3, 7, 70)
        assert_same(op(*args[:2], ids, *args[3:]), op(*copies))


# ---------------------------------------------------------------- greedy rows, invalid drafts


def test_greedy_rows_are_those_of_verify_tree() -> None:
    """With p one-hot the drafter's probabilities do not matter, and are not read."""
    case = random_case(torch.Generator().manual_seed(4), 200, 9, 7, 0.5)
    plain = arguments(case["logits"], case["tokens"], case["parents"])
    for q in (case["q"], torch.full_like(case["q"], math.nan)):
        assert_same(op(case["logits"], q, None, False, *plain[1:]), verify_tree(*plain))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@replacement
def test_an_impossible_token_is_never_emitted(temperature: float, with_replacement: bool) -> None:
    """A token of p = 0 is not accepted, not even by a coin that shows 0, and not left by rejections."""
    p, q = [[0.5, 0.0, 0.5]] * 3, [[0.1, 0.8, 0.1]] * 3
    tree = TokenTree.from_parents([[0, 1, 1]], [[-1, 0, 0]])
    accepted = one_row(p, q, tree, 3000, temperature=temperature, with_replacement=with_replacement)
    assert set(accepted.next_token.tolist()) == {0, 2} and (accepted.length == 1).all()


def test_a_coin_of_zero_does_not_accept_the_impossible() -> None:
    """With a seed whose first coin is exactly 0: u * q = 0 is not below p = 0."""
    seed = 17976797
    assert uniform(*(torch.tensor(x) for x in (seed, 1, 0)), COIN).item() == 0.0
    for p, length in [([0.5, 0.0, 0.5], 1), ([0.5, 1e-30, 0.5], 2)]:
        tree = TokenTree.from_chains([0], [[1]])
        assert one_row([p, p], [[0.1, 0.8, 0.1]] * 2, tree, seed=seed).length.item() == length


@replacement
def test_a_draft_that_q_cannot_produce(with_replacement: bool) -> None:
    """It is passed over, then taken where the emitted token is its own: as often as p says."""
    p, q = [[0.2, 0.5, 0.3]] * 3, [[0.7, 0.0, 0.3]] * 3
    tree = TokenTree.from_parents([[0, 1, 1]], [[-1, 0, 0]])
    accepted = one_row(p, q, tree, 4000, with_replacement=with_replacement)
    assert set(accepted.path[:, 1].tolist()) == {1, -1}  # the first of the two
    assert 0.46 < (accepted.length == 2).double().mean() < 0.54
    assert set(accepted.next_token[accepted.length == 1].tolist()) == {0, 2}


@replacement
def test_drafts_outside_the_vocabulary_are_passed_over(with_replacement: bool) -> None:
    tree = TokenTree.from_parents([[0, -1, 3, 2**40, 2]], [[-1, 0, 0, 0, 0]])
    p = [[0.25, 0.25, 0.5]] * 5
    q = [[0.25, 0.25, 0.5]] * 5
    for options in ({}, {"draft_ids": torch.tensor([2, 1, 0]).expand(50, 5, 3)}):
        probs = [[0.5, 0.25, 0.25]] * 5 if options else q
        accepted = one_row(p, probs, tree, 50, with_replacement=with_replacement, **options)
        assert (accepted.path[:, 1] == 4).all()


def test_equal_siblings_count_once() -> None:
    """p(1) = .2, q(1) = .8: two equal drafts are accepted as often as one, .25, however they were drawn."""
    p, q = [[0.8, 0.2]] * 3, [[0.2, 0.8]] * 3
    tree = TokenTree.from_parents([[0, 1, 1]], [[-1, 0, 0]])
    single = TokenTree.from_parents([[0, 1]], [[-1, 0]])
    expected = one_row(p[:2], q[:2], single, 3000)
    for with_replacement in WITH.values():
        accepted = one_row(p, q, tree, 3000, with_replacement=with_replacement)
        assert torch.equal(accepted.length, expected.length)
        assert not (accepted.path == 2).any()


@replacement
def test_more_siblings_than_lanes(with_replacement: bool) -> None:
    """1,023 siblings, of which only late ones can be accepted; more siblings than tokens."""
    V = 1500
    tokens = torch.arange(1024).flip(0).unsqueeze(0)
    tokens = tokens.repeat(20, 1)
    parents = torch.zeros(20, 1024, dtype=torch.int32)
    parents[:, 0] = -1
    logits = torch.full((20, 1024, V), -30.0)
    logits[:, 0, :60] = 0.0
    q = torch.full((1, 1, V), 1.0 / V).expand(20, 1024, V)
    args = op_arguments(logits, q, None, with_replacement, tokens, parents)
    expected = verify_tree_rejection_ref(*args)
    assert (expected[0][:, 1] > 900).any()
    assert_same(op(*args), expected)
    args = op_arguments(logits[..., :5], q[..., :5], None, with_replacement, tokens % 5, parents)
    assert_same(op(*args), verify_tree_rejection_ref(*args))


def test_probabilities_of_very_different_sizes() -> None:
    """Without replacement, q without its largest token keeps its proportions: no 1 - (1 - 1e-12)."""
    q = torch.tensor([[1.0, 1e-12, 3e-12, 1e-30]]).expand(200, 4, 4)
    logits = torch.tensor([-60.0, 0.0, 0.0, -60.0]).expand(200, 4, 4)
    tokens = torch.tensor([[9, 0, 1, 2]]).expand(200, -1).contiguous()
    parents = torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32).expand(200, -1).contiguous()
    args = op_arguments(logits, q, None, False, tokens, parents)
    expected = verify_tree_rejection_ref(*args)
    assert_same(op(*args), expected)
    # Token 1 has q = 1/4 after the rejection of token 0, p = 1/2: always accepted.
    assert (expected[0][:, 1] == 2).all()


def test_nothing_left_by_rounding() -> None:
    """p is one-hot, q too but for 1e-30: the rejection of token 1 leaves p as it was, not 0 / 0."""
    accepted = one_row([[1.0, 0.0, 0.0]] * 2, [[1.0, 1e-30, 0.0]] * 2, TokenTree.from_chains([0], [[1]]), 50)
    assert (accepted.next_token == 0).all() and (accepted.logprobs[:, 0] == 0.0).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_q_need_not_be_normalised(scale: float) -> None:
    case = random_case(torch.Generator().manual_seed(6), 200, 7, 12, 0.8)
    args = op_arguments(case["logits"], case["q"], None, False, case["tokens"], case["parents"])
    assert_same(op(args[0], args[1] * scale, *args[2:]), op(*args))


# ---------------------------------------------------------------- rows without a distribution


@dtypes
@pytest.mark.parametrize("rule", [SAMPLED, FILTERED], ids=["sampled", "filtered"])
@pytest.mark.parametrize("broken", [math.nan, -INF, INF])
def test_target_rows_without_a_distribution(dtype: torch.dtype, rule: dict, broken: float) -> None:
    logits = torch.full((1, 2, 70), -INF, dtype=dtype)
    logits[0, 0, 1] = 0.0
    logits[0, 1] = broken if broken < 0 else 0.0
    logits[0, 1, 69] = broken
    tree = TokenTree.from_chains([0], [[1]])
    accepted = verify_tree_rejection(logits, tree, torch.ones(1, 2, 70), **rule)
    assert accepted.length.item() == 2 and accepted.next_token.item() == -1
    assert accepted.logprobs[0, 0].item() == 0.0 and accepted.logprobs[0, 1].isnan()


@dtypes
@pytest.mark.parametrize("broken", [math.nan, -0.5, INF])
@pytest.mark.parametrize("sparse", [False, True])
def test_draft_rows_without_a_distribution(dtype: torch.dtype, broken: float, sparse: bool) -> None:
    """At a node with children they end the walk; at a leaf they are not read."""
    tree = TokenTree.from_parents([[0, 1, 2]], [[-1, 0, 1]])
    p = torch.tensor([[0.0, 50.0, 0.0], [0.0, 0.0, 50.0], [50.0, 0.0, 0.0]]).unsqueeze(0)
    q = torch.ones(1, 3, 3, dtype=dtype)
    ids = torch.tensor([1, 2, 0]).expand(1, 3, 3) if sparse else None
    q[0, 2] = broken
    accepted = verify_tree_rejection(p, tree, q, draft_ids=ids)
    assert accepted.path.tolist() == [[0, 1, 2]] and accepted.next_token.item() == 0
    q[0, 1, 2] = broken
    accepted = verify_tree_rejection(p, tree, q, draft_ids=ids)
    assert accepted.path.tolist() == [[0, 1, -1]] and accepted.next_token.item() == -1
    assert accepted.logprobs[0, 1].isnan() and accepted.logprobs[0, 0].item() == 0.0
    args = op_arguments(p, q, ids, False, tree.tokens, tree.parents)
    assert_same(verify_tree_rejection_ref(*args), op(*args))
    if sparse:  # of a padded entry nothing is read
        ids = ids.clone()
        ids[0, 1, 2] = -1
        assert verify_tree_rejection(p, tree, q, draft_ids=ids).length.item() == 3


@replacement
def test_a_drafter_without_mass_leaves_the_rule_of_verify_tree(with_replacement: bool) -> None:
    """q = 0 everywhere, or no entries: a child is accepted where the emitted token is its own."""
    p = [[0.5, 0.5, 0.0]] * 2
    tree = TokenTree.from_chains([0], [[1]])
    zero = one_row(p, [[0.0] * 3] * 2, tree, 2000, with_replacement=with_replacement)
    assert 0.45 < (zero.length == 2).double().mean() < 0.55
    none = one_row(p, [[]] * 2, tree, 2000, draft_ids=torch.zeros(2000, 2, 0, dtype=torch.int64))
    assert torch.equal(zero.length, none.length)


@pytest.mark.parametrize("implementation", [op, verify_tree_rejection_ref])
def test_a_row_without_a_token_has_no_child(implementation: Callable[..., tuple]) -> None:
    """A draft of -1, which no vocabulary holds, is not the token of a broken greedy row."""
    chain = (torch.tensor([[0, -1]]), torch.tensor([[-1, 0]], dtype=torch.int32))
    logits = torch.full((1, 2, 5), math.nan)
    args = op_arguments(logits, torch.ones(1, 2, 5), None, False, *chain, temperature=0.0)
    assert implementation(*args)[0].tolist() == [[0, -1]]
