"""CorpusDrafter and its index: trees, learning, scopes, eviction, threads, bad input."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from corpus_cases import INDEXES, accepted, check_tree, filled, ids, passes_of, row
from hypothesis import given, settings
from hypothesis import strategies as st

from specfuse.drafters import CorpusDrafter, DraftState
from specfuse.ops import native


@pytest.fixture(params=["native", "python"])
def new_index(request: pytest.FixtureRequest) -> type:
    if request.param not in INDEXES:
        pytest.skip(f"native module not built: {native.missing.get('cpu')}")
    return INDEXES[request.param]


# -------------------------------------------------------------------- trees


answers_strategy = st.lists(st.lists(st.integers(0, 6), max_size=24), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(INDEXES)),
    answers=answers_strategy,
    prefix=st.lists(st.integers(0, 6), max_size=10),
    max_nodes=st.integers(0, 40),
    max_depth=st.integers(0, 12),
    max_tokens=st.integers(1, 80),
)
def test_every_proposal_is_a_valid_tree(kind, answers, prefix, max_nodes, max_depth, max_tokens):
    index = INDEXES[kind](max_tokens)
    for i, answer in enumerate(answers):
        index.observe(ids(*answer), scope=i % 2)
        assert index.num_tokens <= max_tokens
    drafted = index.propose(ids(*prefix), max_nodes=max_nodes, max_depth=max_depth)
    check_tree(drafted, max_nodes, max_depth)
    # Only what was said can be drafted.
    assert set(drafted[0].tolist()) <= {token for answer in answers for token in answer}


def test_empty_index_proposes_nothing(new_index):
    tokens, parents, probs = new_index(100).propose(ids(1, 2, 3))
    assert (len(tokens), len(parents), len(probs)) == (0, 0, 0)


def test_a_repeated_answer_is_proposed_whole_from_its_start(new_index):
    index = new_index(1000)
    answer = list(range(100, 120))
    for _ in range(3):
        index.observe(ids(*answer))
    assert accepted(index.propose(ids(), max_nodes=20), answer) == 20
    assert accepted(index.propose(ids(*answer[:7]), max_nodes=20), answer[7:]) == 13


def test_both_continuations_become_siblings(new_index):
    index = new_index(1000)
    for _ in range(3):
        index.observe(ids(1, 2, 3))
        index.observe(ids(1, 2, 4))
    tokens, parents, probs = index.propose(ids(1, 2), max_nodes=8)
    first = {token: prob for token, parent, prob in zip(tokens, parents, probs, strict=True) if parent < 0}
    assert {3, 4} <= set(first)
    assert first[4] >= first[3], "the more recent continuation comes first"


def test_a_larger_budget_only_adds_nodes():
    index = INDEXES[max(INDEXES)](10_000)
    rng = np.random.default_rng(0)
    for _ in range(60):
        index.observe(rng.integers(0, 5, 30).astype(np.int32))
    small = index.propose(ids(1, 2), max_nodes=8)
    large = index.propose(ids(1, 2), max_nodes=24)
    paths = [[], []]
    for tree, found in zip((small, large), paths, strict=True):
        for i, parent in enumerate(tree[1].tolist()):
            found.append((*(found[parent] if parent >= 0 else ()), int(tree[0][i])))
    assert len(large[0]) == 24
    # Small trees leave out the last digits of a blend: the least likely nodes may differ, the trunk may not.
    assert len(set(paths[0]) & set(paths[1])) >= 7


# ----------------------------------------------------------------- learning


def test_learning_reduces_passes():
    answer = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
    drafter = CorpusDrafter()
    assert passes_of(drafter, answer) == len(answer)
    drafter.observe(answer, question=[1])
    assert passes_of(drafter, answer) < len(answer) / 3
    assert passes_of(drafter, answer[::-1]) > len(answer) / 3, "another answer is not known"


def test_a_proposal_does_not_depend_on_what_comes_later():
    """No peeking: what is proposed before an answer is observed cannot change with the answer."""
    rng = np.random.default_rng(1)
    history = [rng.integers(0, 4, 20).tolist() for _ in range(30)]
    proposals = []
    for secret in ([7, 7, 7, 7], [0, 1, 2, 3]):
        drafter = CorpusDrafter()
        for answer in history:
            drafter.observe(answer, question=[1])
        tree = drafter.propose(row([], [1]), 16)
        drafter.observe(secret, question=[1])
        proposals.append((tree.tokens.tolist(), tree.parents.tolist(), tree.probs.tolist()))
        assert 7 not in tree.tokens[0].tolist()
    assert proposals[0] == proposals[1]


def test_proposing_changes_nothing(new_index):
    index = new_index(1000)
    index.observe(ids(1, 2, 3, 4, 5))
    first = index.propose(ids(1, 2))
    for _ in range(5):
        index.propose(ids(3), scope=9)
    again = index.propose(ids(1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_recent_answers_count_more(new_index):
    index = new_index(10_000)
    for _ in range(6):
        index.observe(ids(1, 2, 3))
    for _ in range(6):
        index.observe(ids(1, 2, 4))
    tokens, _, _ = index.propose(ids(1, 2), max_nodes=1)
    assert tokens.tolist() == [4]


# ------------------------------------------------------------------- scopes


def test_answers_to_the_same_question_are_preferred(new_index):
    index = new_index(10_000)
    for _ in range(4):
        index.observe(ids(10, 11, 12), scope=1)
        index.observe(ids(20, 21, 22), scope=2)
    assert index.propose(ids(), scope=1, max_nodes=1)[0].tolist() == [10]
    assert index.propose(ids(), scope=2, max_nodes=1)[0].tolist() == [20]


def test_an_unknown_question_falls_back_to_all_answers(new_index):
    index = new_index(10_000)
    for _ in range(4):
        index.observe(ids(10, 11, 12, 13), scope=1)
    drafted = index.propose(ids(), scope=3, max_nodes=4)
    assert accepted(drafted, [10, 11, 12, 13]) == 4


def test_the_drafter_takes_the_question_from_the_prompt_without_video_tokens():
    drafter = CorpusDrafter()
    for _ in range(4):
        drafter.observe([10, 11, 12], question=[5, 6])
        drafter.observe([20, 21, 22], question=[5, 7])
    for question, expected in (([5, 6], 10), ([5, 7], 20)):
        prompt = [question[0], 999, 999, question[1]]
        tree = drafter.propose(row([], prompt, visual_token_ids=frozenset({999})), 1)
        assert tree.tokens[0].tolist() == [prompt[-1], expected]


# ----------------------------------------------------------------- eviction


def test_the_oldest_answers_leave_and_are_not_proposed_again(new_index):
    index = new_index(200)
    index.observe(ids(*range(500, 520)))
    assert 501 in index.propose(ids(500))[0]
    rng = np.random.default_rng(2)
    for _ in range(40):
        index.observe(rng.integers(0, 9, 25).astype(np.int32))
        assert index.num_tokens <= 200
    assert index.num_answers == 8
    for prefix in ((), (500,), (500, 501), (508, 509, 510)):
        tokens = index.propose(ids(*prefix), max_nodes=64)[0]
        assert tokens.max() < 9, tokens


def test_memory_stays_bounded_while_answers_come_and_go():
    if native.cpu is None:
        pytest.skip(f"native module not built: {native.missing.get('cpu')}")
    index = native.cpu.CorpusIndex(20_000)
    rng = np.random.default_rng(3)
    for _ in range(2_000):
        index.observe(rng.integers(0, 32_000, 50).astype(np.int32))
    assert index.num_tokens == 20_000
    # The promise is for a large index; the first table alone is 16 KiB.
    assert index.nbytes <= 100 * 20_000 + 32_768


def test_an_answer_longer_than_the_bound_keeps_its_end(new_index):
    index = new_index(10)
    index.observe(ids(*range(30)))
    assert (index.num_answers, index.num_tokens) == (1, 10)
    assert accepted(index.propose(ids(20, 21)), [22, 23, 24]) == 3
    assert len(index.propose(ids(3, 4))[0]) == 0 or 5 not in index.propose(ids(3, 4))[0]


def test_positions_that_run_out_change_nothing_one_can_see():
    if native.cpu is None:
        pytest.skip(f"native module not built: {native.missing.get('cpu')}")
    fresh, old = native.cpu.CorpusIndex(2_000), native.cpu.CorpusIndex(2_000, first_position=0xF0000000 - 300)
    rng = np.random.default_rng(6)
    for i in range(60):
        answer = rng.integers(0, 5, 20).astype(np.int32)
        for index in (fresh, old):
            index.observe(answer, scope=i % 2)
        a, b = (index.propose(answer[:3], scope=1, max_nodes=16) for index in (fresh, old))
        assert a[0].tolist() == b[0].tolist() and a[1].tolist() == b[1].tolist(), i
    assert old.num_tokens == fresh.num_tokens == 1_200


# ------------------------------------------------------------------ threads


def test_threads_observe_and_propose_at_once():
    drafter = CorpusDrafter(max_tokens=4_000)
    answers = [np.random.default_rng(s).integers(0, 50, 20).tolist() for s in range(200)]
    failures: list[BaseException] = []

    def work(part: Iterator[list[int]]) -> None:
        try:
            for answer in part:
                drafter.observe(answer, question=[1])
                tree = drafter.propose(row(answer[:5], [1]), 16)
                tree.validate()
                assert drafter.num_tokens <= 4_000
        except BaseException as error:  # a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(iter(answers[i::8]),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (len(drafter), drafter.num_tokens) == (200, 4_000)


# -------------------------------------------------------- the drafter's edges


def test_batches_give_the_trees_of_single_rows():
    drafter = filled()
    state = DraftState(
        prompts=[[8, 0], [8, 1], [8, 2]],
        answers=[[], [1, 2], [3]],
        active=[True, False, True],
        remaining=[20, 20, 2],
    )
    tree = drafter.propose(state, 12)
    tree.validate()
    assert tree.num_nodes[1] == 1, "an inactive row proposes nothing"
    assert tree.depths()[2].max() == 1, "one token may follow the two that remain, minus the target's own"
    single = drafter.propose(row([], [8, 0], 20), 12)
    assert tree.tokens[0, : single.width].tolist() == single.tokens[0].tolist()


def test_ids_beyond_the_vocabulary_are_never_drafted():
    drafter = CorpusDrafter()
    for _ in range(3):
        drafter.observe([1, 2, 900, 3, 4], question=[1])
        drafter.observe([1, 2, 5, 6], question=[1])
    assert 900 in drafter.propose(row([1], [1]), 16).tokens[0].tolist()
    tree = drafter.propose(row([1], [1], vocab_size=900), 16)
    tree.validate()
    tokens = tree.tokens[0].tolist()
    assert 900 not in tokens and {2, 5, 6} <= set(tokens)


def test_answers_longer_than_the_window_are_drafted_alike():
    rng = np.random.default_rng(5)
    answer = rng.integers(0, 30_000, 700).tolist()
    drafter = CorpusDrafter()
    drafter.observe(answer, question=[1])
    for done in (255, 256, 257, 600):
        tree = drafter.propose(row(answer[:done], [1]), 8)
        assert tree.tokens[0, 1:].tolist() == answer[done : done + 8]


def test_evidence_tells_answers_apart():
    drafter = CorpusDrafter()
    for _ in range(6):
        drafter.observe([1, 2, 3, 4], question=[1], evidence=[50])
        drafter.observe([1, 2, 8, 9], question=[1], evidence=[60])
    if native.cpu is None:
        pytest.skip("the Python index does not use evidence")
    for hint, expected in (([50], 3), ([60], 8)):
        tree = drafter.propose(row([1, 2], [1], evidence=[hint]), 1)
        assert tree.tokens[0, 1].item() == expected


@pytest.mark.parametrize("tokens", [[-1], [2**31], [1.5], "text", [[1, 2]], [None]])
def test_bad_tokens_are_refused(tokens):
    drafter = CorpusDrafter()
    with pytest.raises(ValueError, match="tokens"):
        drafter.observe(tokens)
    with pytest.raises(ValueError, match="question"):
        drafter.observe([1], question=tokens)
    assert len(drafter) == 0


def test_numpy_and_torch_ids_are_taken():
    import torch

    drafter = CorpusDrafter()
    for tokens in (np.array([1, 2, 3]), torch.tensor([1, 2, 3]), (1, 2, 3)):
        drafter.observe(tokens)
    drafter.observe([])
    assert (len(drafter), drafter.num_tokens) == (3, 9)


@pytest.mark.parametrize("max_tokens", [0, -5, 2**31])
def test_a_bad_bound_is_refused(max_tokens):
    with pytest.raises(ValueError, match=f"max_tokens must be from 1 to .* got {max_tokens}"):
        CorpusDrafter(max_tokens)


def test_without_native_code_the_python_index_takes_over(monkeypatch):
    monkeypatch.setattr(native, "cpu", None)
    drafter = CorpusDrafter()
    answer = list(range(40, 60))
    drafter.observe(answer, question=[1])
    assert passes_of(drafter, answer) < len(answer) / 3
    assert drafter.nbytes > 0
