"""``max_nodes="auto"``: the same tokens always; wide where wide pays, plain where nothing does."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from scripted_drafters import OracleDrafter, RandomTreeDrafter
from test_plan import KnownChains, known_world
from tiny_models import random_prompts, tiny_llama

import specfuse
from specfuse.stats import GenerationStats
from specfuse.tree import TokenTree
from specfuse.tree_size import LARGEST, SIZES, Costs, TreeSize, _cut, _gains, costs_of


class World:
    """A target whose passes cost what a function says; drafts come true or not. No clock is read."""

    def __init__(self, cost_ms, draft_ms: float, right: int, offered: int = LARGEST):
        self.cost_ms, self.draft_ms, self.right, self.offered = cost_ms, draft_ms, right, offered
        self.costs = Costs()

    def answer(self, tokens: int) -> tuple[float, list[int]]:
        """Milliseconds of one call behind the prefill, and how many drafts each of its passes had."""
        pace, stats, done, widths = TreeSize(self.costs, prompt=512), GenerationStats(), 0, []
        first = True
        while done < tokens:
            width = 0
            if not pace.rests():
                stats.draft_ms += self.draft_ms
                width = pace.trim(self.tree()).width - 1
            accepted = min(self.right, width)
            if not first:
                stats.verify_ms += self.cost_ms(width)
                widths.append(width)
            first = False
            done += 1 + accepted
            pace.learn(accepted, width, 1, stats)
        return stats.draft_ms + stats.verify_ms, widths

    def tree(self) -> TokenTree:
        # Claims to be sure of the whole chain.
        probs = [[1.0, *[0.9] * self.offered]]
        parents = [list(range(-1, self.offered))]
        return TokenTree.from_parents([list(range(self.offered + 1))], parents, probs)


@pytest.mark.parametrize("draft_ms", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("tokens", [60, 400])
def test_where_nothing_comes_true_it_costs_at_most_three_percent(draft_ms, slope, tokens):
    world = World(lambda width: 10.0 * (1 + slope * width), draft_ms, right=0)
    calls = [world.answer(tokens) for _ in range(8)]
    spent = sum(ms for ms, _ in calls)
    plain = 8 * (tokens - 1) * 10.0
    assert spent <= 1.03 * plain
    assert spent > plain, "it goes on trying"


def test_without_the_ledger_the_bound_does_not_hold(monkeypatch):
    monkeypatch.setattr("specfuse.tree_size.ALLOWANCE", 1.0)
    with pytest.raises(AssertionError):
        test_where_nothing_comes_true_it_costs_at_most_three_percent(3.0, 0.3, 400)


@pytest.mark.parametrize(
    ("cost_ms", "right", "smallest", "largest"),
    [
        (lambda width: 10.0 + 0.01 * width, 40, 32, 64),  # width costs nothing, all comes true: wide
        (lambda width: 10.0 if width <= 8 else 10.0 + 5.0 * (width - 8), 40, 8, 8),  # a cliff behind 8
        (lambda width: 10.0 + 12.0 * width, 40, 0, 0),  # every draft costs more than it brings
    ],
)
def test_it_finds_the_size_that_pays(cost_ms, right, smallest, largest):
    world = World(cost_ms, 0.05, right)
    for _ in range(4):
        world.answer(400)
    _, widths = world.answer(400)
    usual = sorted(widths)[len(widths) // 2]
    assert smallest <= usual <= largest


def test_it_wakes_up_when_drafts_come_true_again():
    world = World(lambda width: 10.0 + 0.05 * width, 0.1, right=0)
    for _ in range(5):
        world.answer(100)
    world.right = 6
    _, widths = world.answer(100)
    assert len(widths) < 40


def test_costs_are_kept_by_model_drafter_batch_and_prompt():
    model, other = tiny_llama(seed=0), tiny_llama(seed=1)
    lookup, again = specfuse.PromptLookupDrafter(), specfuse.PromptLookupDrafter()
    kept = costs_of(model, lookup, 1, 100)
    assert kept is costs_of(model, lookup, 1, 120)
    different = [
        (other, lookup, 1, 100),
        (model, again, 1, 100),
        (model, lookup, 2, 100),
        (model, lookup, 1, 300),
    ]
    assert all(costs_of(*key) is not kept for key in different)
    shares_times = [costs_of(*key).times is kept.times for key in different]
    assert shares_times == [False, True, False, False]


def test_a_short_prompt_carries_no_tree_on_trial():
    world = World(lambda width: 10.0, 0.1, right=0)
    for size in SIZES:
        world.costs.times[size] += [10.0 * (1 + size)] * 3
    kept = [TreeSize(world.costs, prompt).trim(world.tree()).width - 1 for prompt in (8, 80, 512)]
    assert kept == [0, 2, 8]


def test_cut_keeps_the_most_probable_nodes_and_their_parents():
    #        0 -> 1 (.5) -> 3 (.4), 0 -> 2 (.3) -> 4 (.9, more than its parent can give), and a finished row
    tree = TokenTree.from_parents([[7, 1, 2, 3, 4], []], [[-1, 0, 0, 1, 2], []])
    chances = [[0.5, 0.3, 0.4, 0.9], []]
    for size, tokens, parents in [
        (1, [7, 1], [-1, 0]),
        (2, [7, 1, 3], [-1, 0, 1]),
        (3, [7, 1, 2, 3], [-1, 0, 0, 1]),
    ]:
        cut = _cut(tree, chances, size)
        cut.validate()
        assert cut.tokens[0].tolist() == tokens and cut.parents[0].tolist() == parents
        assert cut.num_nodes.tolist() == [size + 1, 0]
    assert _cut(tree, chances, 0).tokens.tolist() == [[7], [0]]
    assert _gains([[0.5, 0.1], [0.9], []]) == pytest.approx([0.0, 0.7, 0.75])


def test_unknown_widths_are_tried_one_step_at_a_time():
    costs = Costs()
    for following in SIZES[1:]:
        assert costs.largest == following
        costs.times[following].append(1.0)
    assert costs.largest == LARGEST == SIZES[-1]


def test_what_is_tried_is_no_dearer_than_can_be_lost():
    costs = Costs()
    costs.times[0] += [10.0] * 3
    costs.times[2] += [11.0] * 3
    assert costs.largest == 4, "two milliseconds more, of a quarter of a pass"
    costs.times[4] += [12.0] * 3
    assert costs.largest == 4, "eight would be four more"
    costs.balance = 15.0
    assert costs.largest == 8, "what has been earned may be lost"
    costs.times[8] += [18.0] * 3
    costs.times[16] += [30.0] * 3
    assert costs.largest == 8
    costs.times[2] = costs.times[4] = deque([30.0])
    costs.balance = -5.0
    assert costs.largest == SIZES[1], "the smallest is always left"


@pytest.mark.parametrize("draft_ms", [0.01, 0.5])
@pytest.mark.parametrize("slope", [0.01, 0.05, 0.1, 0.3])
def test_no_single_call_costs_more_than_three_percent(draft_ms, slope):
    world = World(lambda width: 10.0 * (1 + slope * width), draft_ms, right=0)
    plain = 59 * 10.0
    for call in range(8):
        spent, widths = world.answer(60)
        assert spent <= 1.03 * plain, (call, widths)


def test_without_the_bound_on_what_is_tried_a_call_does(monkeypatch):
    monkeypatch.setattr("specfuse.tree_size.RISK", 100.0)
    monkeypatch.setattr("specfuse.tree_size.SIZES", (0, 8, 16, 32, 64))
    with pytest.raises(AssertionError):
        test_no_single_call_costs_more_than_three_percent(0.5, 0.3)


def test_a_new_prompt_size_begins_with_the_times_of_the_nearest():
    model, lookup = tiny_llama(seed=0), specfuse.PromptLookupDrafter()
    costs_of(model, lookup, 1, 100).times[0] += [3.0] * 9
    costs_of(model, lookup, 1, 5000).times[0] += [9.0] * 9
    near = costs_of(model, lookup, 1, 300)
    assert list(near.times[0]) == [3.0] * 3
    near.times[0].append(4.0)
    assert list(costs_of(model, lookup, 1, 100).times[0]) == [3.0] * 9, "a copy"
    assert not costs_of(model, lookup, 2, 300).times[0]


def test_one_stall_does_not_keep_a_size_away():
    costs = Costs()
    costs.times[0] += [10.0] * 3
    costs.times[2].append(500.0)
    costs.times[4] += [12.0, 500.0, 13.0]
    assert [costs.pass_ms(size) for size in (0, 2, 4, 8)] == [10.0, 13.0, 13.0, 13.0]
    costs.forget_strays()
    assert not costs.times[2] and len(costs.times[4]) == 3
    costs.times[4].clear()
    assert costs.pass_ms(64) == 10.0 and Costs().pass_ms(0) == 1.0


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_plain_decoding(batch):
    model = tiny_llama(seed=0, eos=False)
    inputs = {**random_prompts(model, batch), "max_new_tokens": 60, "do_sample": False}
    expected = model.generate(**inputs)
    answers = expected[:, inputs["input_ids"].shape[1] :].tolist()
    for drafter in (OracleDrafter(answers, 128), RandomTreeDrafter(128), "auto", "auto", None):
        assert torch.equal(specfuse.generate(model, drafter, max_nodes="auto", **inputs), expected)
    sampled = {**inputs, "do_sample": True, "seed": 3}
    plain = specfuse.generate(model, None, **sampled)
    assert torch.equal(specfuse.generate(model, "auto", max_nodes="auto", **sampled), plain)


def test_a_drafter_that_is_right_is_used():
    model, sample, answers = known_world(1)
    generator = specfuse.SpeculativeGenerator(model, KnownChains(answers, right=30), max_nodes="auto")
    for _ in range(3):
        generator.generate(**sample[0], max_new_tokens=30)
    assert generator.last_stats.tokens_per_pass > 2


@pytest.mark.parametrize("bad", ["big", 0, 1024, 2.5, None])
def test_max_nodes_is_auto_or_a_number(bad):
    with pytest.raises(ValueError, match="max_nodes must be 'auto' or an int from 1 to 1023"):
        specfuse.SpeculativeGenerator(tiny_llama(seed=0), "lookup", max_nodes=bad)
