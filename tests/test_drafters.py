"""Drafters keep the protocol: valid trees within the budget, rooted at the last committed token."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_drafters import OracleChainDrafter, RandomTreeDrafter
from tiny_models import tiny_llama

import specfuse
from specfuse import CombinedDrafter, CorpusDrafter, Drafter, DraftState, ModelDrafter, PromptLookupDrafter
from specfuse.drafters import auto_drafter, resolve_drafter, root_only
from specfuse.tree import TokenTree

VISUAL = 99


def state_of(prompts, answers=None, active=None, remaining=40, **fields) -> DraftState:
    batch = len(prompts)
    return DraftState(
        prompts=prompts,
        answers=answers if answers is not None else [[] for _ in prompts],
        active=active or [True] * batch,
        remaining=[remaining] * batch,
        visual_token_ids=frozenset({VISUAL}),
        **fields,
    )


def paths_of(tree: TokenTree, row: int = 0) -> set[tuple[int, ...]]:
    """Every root-to-node token path of a row, root left out."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    paths = {0: ()}
    for node in range(1, int(tree.num_nodes[row])):
        paths[node] = (*paths[parents[node]], tokens[node])
    return set(paths.values()) - {()}


def check_protocol(tree: TokenTree, state: DraftState, max_nodes: int) -> None:
    tree.validate()
    assert tree.batch_size == state.batch_size
    assert tree.width <= max_nodes + 1
    depths = tree.depths()
    for row in range(state.batch_size):
        assert tree.tokens[row, 0] == state.root(row)
        count = int(tree.num_nodes[row])
        assert count == 1 or state.active[row]
        assert int(depths[row].max()) <= max(state.remaining[row] - 1, 0)
        if tree.probs is not None:
            probs, parents = tree.probs[row, :count].tolist(), tree.parents[row, :count].tolist()
            assert probs[0] == 1.0
            for node in range(1, count):
                assert 0 <= probs[node] <= probs[parents[node]] + 1e-6


def taught_corpus() -> CorpusDrafter:
    drafter = CorpusDrafter()
    drafter.observe([5, 6, 7, 8, 9, 2])
    drafter.observe([5, 6, 7, 3, 4, 2])
    return drafter


KINDS = {
    "lookup": PromptLookupDrafter,
    "corpus": taught_corpus,
    "combined": lambda: CombinedDrafter([taught_corpus(), PromptLookupDrafter()]),
    "nested": lambda: CombinedDrafter([CombinedDrafter([PromptLookupDrafter()]), taught_corpus()]),
}
tokens = st.lists(st.integers(3, 9), max_size=20)


@pytest.mark.parametrize("kind", KINDS)
@given(
    prompts=st.lists(tokens.filter(bool), min_size=1, max_size=3),
    answer=tokens,
    max_nodes=st.integers(1, 40),
    remaining=st.integers(1, 30),
    first_active=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_protocol(kind, prompts, answer, max_nodes, remaining, first_active):
    drafter = KINDS[kind]()
    state = state_of(prompts, [[] for _ in prompts], remaining=remaining)
    for step in range(0, len(answer) + 1, 4):
        state.answers[:] = [answer[:step] for _ in prompts]
        state.active = [first_active] + [True] * (len(prompts) - 1)
        check_protocol(drafter.propose(state, max_nodes), state, max_nodes)


def test_lookup_copies_what_followed_the_longest_match():
    state = state_of([[1, 2, 3, 4, 5, 6, 9, 2, 3, 7, 8, 1, 2, 3]])
    paths = paths_of(PromptLookupDrafter().propose(state, 30))
    assert (4, 5, 6, 9) in paths  # behind "1 2 3"
    assert (7, 8) in paths  # behind the more recent but shorter "2 3"


def test_lookup_sees_the_answer_grow_and_skips_placeholders():
    state = state_of([[4, VISUAL, VISUAL, 5]])
    drafter = PromptLookupDrafter()
    assert drafter.propose(state, 8).width == 1
    state.answers[0] += [4, 5, 6, 4]
    assert (5, 6, 4) in paths_of(drafter.propose(state, 8))
    assert all(VISUAL not in path for path in paths_of(drafter.propose(state, 8)))


def test_one_instance_serves_several_requests_at_once():
    drafter = PromptLookupDrafter()
    first, second = state_of([[1, 2, 1]]), state_of([[1, 3, 1], [4, 5, 4]])
    assert (2,) in paths_of(drafter.propose(first, 4))
    assert (3,) in paths_of(drafter.propose(second, 4))
    assert (5,) in paths_of(drafter.propose(second, 4), row=1)
    first.answers[0].append(2)
    assert (1,) in paths_of(drafter.propose(first, 4))


class Fixed(Drafter):
    """Proposes given chains with given probabilities."""

    def __init__(self, *chains: tuple[list[int], float]):
        self.chains = chains
        self.seen: list[tuple[list[int], tuple[int, ...]]] = []

    def propose(self, state, max_nodes):
        rows, parents, probs = [state.root(0)], [-1], [1.0]
        for chain, chance in self.chains:
            node = 0
            for token in chain:
                rows.append(token)
                parents.append(node)
                probs.append(probs[node] * chance)
                node = len(rows) - 1
        return TokenTree.from_parents([rows], [parents], [probs])

    def observe(self, tokens, question=()):
        self.seen.append((list(tokens), tuple(question)))


def test_combined_keeps_the_most_probable_nodes_of_all():
    unsure, sure = Fixed(([10, 11, 12], 0.3)), Fixed(([20, 21, 22], 0.9))
    tree = CombinedDrafter([unsure, sure]).propose(state_of([[1]]), 4)
    assert paths_of(tree) == {(20,), (20, 21), (20, 21, 22), (10,)}


def test_combined_does_not_bother_with_a_tree_that_gains_nothing():
    weak = Fixed(([10], 0.04), ([11], 0.05))
    assert CombinedDrafter([weak]).propose(state_of([[1]]), 4).width == 1
    assert CombinedDrafter([weak], min_gain=0.05).propose(state_of([[1]]), 4).width == 3


def test_combined_merges_equal_paths():
    tree = CombinedDrafter([Fixed(([10, 11], 0.5)), Fixed(([10, 12], 0.6))]).propose(state_of([[1]]), 8)
    assert paths_of(tree) == {(10,), (10, 11), (10, 12)}
    assert int(tree.num_nodes[0]) == 4


def test_combined_learns_whom_to_believe():
    boaster, modest = Fixed(([10, 11, 12], 0.95)), Fixed(([20, 21, 22], 0.4))
    drafter = CombinedDrafter([boaster, modest])
    for _ in range(30):  # the modest one is always right
        state = state_of([[1]])
        drafter.propose(state, 3)
        state.answers[0] += [20, 21, 22, 5]
        drafter.propose(state, 3)
    tree = drafter.propose(state_of([[1]]), 3)
    assert paths_of(tree) == {(20,), (20, 21), (20, 21, 22)}


def test_combined_stops_proposing_what_never_comes_true():
    drafter = CombinedDrafter([Fixed(([10, 11, 12], 0.9), ([20], 0.3))])
    assert drafter.propose(state_of([[1]]), 8).width == 5
    for _ in range(1200):
        state = state_of([[1]])
        drafter.propose(state, 8)
        state.answers[0] += [5]
        drafter.propose(state, 8)
    assert drafter.propose(state_of([[1]]), 8).width == 1


def test_combined_hands_on_what_it_observes_and_needs():
    inner = [Fixed(), Fixed()]
    drafter = CombinedDrafter(inner)
    drafter.observe([1, 2], question=(7,))
    assert [d.seen for d in inner] == [[([1, 2], (7,))]] * 2
    assert not drafter.needs_target
    inner[1].needs_target = True
    assert CombinedDrafter(inner).needs_target


def test_combined_drafts_first_with_those_that_can():
    model = tiny_llama(seed=0, eos=False)
    ids = torch.arange(5, 13)[None]
    answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, 8:].tolist()

    class Reader(Drafter):
        needs_target = True
        asked = 0

        def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
            assert state.hidden, "asked before there was anything to read"
            self.asked += 1
            return root_only(state)

    reader = Reader()
    assert not reader.drafts_first and not CombinedDrafter([reader]).drafts_first
    drafter = CombinedDrafter([reader, OracleChainDrafter([answer], 4)])
    assert drafter.needs_target and drafter.drafts_first
    generator = specfuse.SpeculativeGenerator(model, drafter)
    assert generator.generate(ids, max_new_tokens=20, do_sample=False)[0, 8:].tolist() == answer
    assert generator.last_stats.passes == 4 and reader.asked == 3


def test_combined_beats_each_part_on_its_own():
    """Two drafters that know one half of the answer each: together they know all of it."""
    answer = list(range(10, 30))
    halves = [OracleChainDrafter([answer[:10]], 4), OracleChainDrafter([[0] * 10 + answer[10:]], 4)]

    def passes(drafter) -> int:
        state, count = state_of([[1]]), 0
        while len(state.answers[0]) < len(answer):
            paths = paths_of(drafter.propose(state, 8))
            done = state.answers[0]
            accepted = 0
            while tuple(answer[len(done) : len(done) + accepted + 1]) in paths:
                accepted += 1
            done += answer[len(done) : len(done) + accepted + 1]
            count += 1
        return count

    assert passes(CombinedDrafter(halves)) < min(passes(half) for half in halves)


def test_model_drafter_builds_a_tree_of_its_best_guesses():
    model = tiny_llama(seed=0)
    prompt = [1, 5, 6, 7]
    state = state_of([prompt], inputs={"input_ids": torch.tensor([prompt])}, vocab_size=128)
    tree = ModelDrafter(model, depth=2, branching=3).propose(state, 64)
    best = model(torch.tensor([prompt])).logits[0, -1].softmax(-1).topk(3)
    children = [i for i in range(int(tree.num_nodes[0])) if tree.parents[0, i] == 0]
    assert tree.tokens[0, children].tolist() == best.indices.tolist()
    torch.testing.assert_close(tree.probs[0, children], best.values)
    deeper = [i for i in range(int(tree.num_nodes[0])) if tree.parents[0, i] == children[0]]
    again = model(torch.tensor([[*prompt, int(best.indices[0])]])).logits[0, -1].topk(3).indices
    assert tree.tokens[0, deeper].tolist() == again.tolist()


@pytest.mark.parametrize("branching", [1, 2])
def test_model_drafter_keeps_the_protocol_in_ragged_batches(branching):
    model = tiny_llama(seed=1)
    prompts = [[1, 5, 6], [1, 7, 8]]
    state = state_of(prompts, inputs={"input_ids": torch.tensor(prompts)}, vocab_size=128)
    drafter = ModelDrafter(model, depth=3, branching=branching)
    for grown in ([[], []], [[9], [10, 11, 12]], [[9, 4, 5, 6], [10, 11, 12]]):
        for answer, longer in zip(state.answers, grown, strict=True):
            answer[:] = longer
        tree = drafter.propose(state, 6)
        check_protocol(tree, state, 6)
        fresh = state_of(prompts, [list(a) for a in grown], inputs=state.inputs, vocab_size=128)
        again = ModelDrafter(model, depth=3, branching=branching).propose(fresh, 6)
        assert torch.equal(tree.tokens, again.tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptLookupDrafter(max_ngram=0), "min_ngram must be from 1 to max_ngram=0"),
        (lambda: PromptLookupDrafter(max_matches=0), "max_matches and max_depth must be at least 1"),
        (lambda: CombinedDrafter([]), "at least one drafter"),
        (lambda: CombinedDrafter(["corpus"]), "Drafter objects, got str"),
        (lambda: CombinedDrafter([Fixed()], min_prob=1.0), r"min_prob must lie in \[0, 1\), got 1.0"),
        (lambda: CombinedDrafter([Fixed()], min_gain=-1), "min_gain must not be negative, got -1"),
        (lambda: ModelDrafter("gpt2"), "PreTrainedModel, got str"),
        (lambda: ModelDrafter(tiny_llama(), depth=0), "depth and branching must be at least 1, got 0 and 1"),
        (lambda: resolve_drafter(3, None), "got 3"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_model_drafter_inputs_must_fit():
    state = state_of([[1], [1]], inputs={"input_ids": torch.tensor([[1], [1]])})
    with pytest.raises(ValueError, match="the drafter's inputs have 1 rows, the target's 2"):
        ModelDrafter(tiny_llama(), inputs={"input_ids": torch.tensor([[1]])}).propose(state, 4)
    with pytest.raises(ValueError, match=r"draft_inputs must hold input_ids or pixels, got \['pixels'\]"):
        state.draft_inputs = {"pixels": torch.zeros(1)}
        ModelDrafter(tiny_llama()).propose(state, 4)


def test_resolve_drafter():
    model = tiny_llama()
    assert resolve_drafter(None, model) is None and resolve_drafter("none", model) is None
    assert resolve_drafter("auto", model) is auto_drafter(model) is resolve_drafter("auto", model)
    assert resolve_drafter("corpus", model) is auto_drafter(model).drafters[0]
    assert isinstance(resolve_drafter("lookup", model), PromptLookupDrafter)
    given = RandomTreeDrafter(8)
    assert resolve_drafter(given, model) is given


def test_auto_drafter_is_made_once_under_threads():
    model, made = tiny_llama(), []
    threads = [threading.Thread(target=lambda: made.append(auto_drafter(model))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(drafter) for drafter in made}) == 1


def test_root_only_proposes_nothing():
    tree = root_only(state_of([[1, 2], [3]]))
    assert tree.tokens.tolist() == [[2], [3]]
    tree.validate()


class Returns(Drafter):
    """Proposes whatever it was given."""

    def __init__(self, tree):
        self.tree = tree

    def propose(self, state, max_nodes):
        return self.tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (None, "drafter Returns returned NoneType, not a TokenTree"),
        (TokenTree.from_chains([99], [[5]]), "row 0 with root 99 and 2 nodes, its root is"),
        (TokenTree.from_chains([1, 1], [[5], [6]]), r"trees of shape \(2, 2\) for 1 rows"),
        (TokenTree.from_chains([1], [[5] * 40]), r"trees of shape \(1, 41\) .* at most 32 nodes"),
        (TokenTree.from_parents([[1, 4, 4]], [[-1, 0, 0]]), "a bad tree: row 0: duplicate siblings"),
        (TokenTree.from_parents([[1, 4]], [[-1, 7]]), "a bad tree: .* is not a node"),
    ],
)
def test_a_malformed_tree_is_refused_with_the_drafters_name(tree, message):
    """A wrong root would change the answer; the rest would end in errors that do not say whose they are."""
    with pytest.raises(ValueError, match=message):
        specfuse.generate(tiny_llama(), Returns(tree), input_ids=torch.tensor([[1, 5, 6]]), max_new_tokens=6)
