"""A drafter that is never right is asked less and less; one that is right is asked every time."""

from __future__ import annotations

import torch
from scripted_drafters import OracleChainDrafter
from tiny_models import random_prompts, tiny_llama

import specfuse
from specfuse.pacing import Backoff


def drafted_passes(backoff: Backoff, outcomes: list[int]) -> list[bool]:
    """Which passes draft, when the drafted ones have these many drafts accepted (0 for ever afterwards)."""
    drafted, left = [], list(outcomes)
    for _ in range(40):
        drafted.append(not backoff.rests())
        if drafted[-1]:
            backoff.learn(left.pop(0) if left else 0)
    return drafted


def test_rests_grow_up_to_the_longest():
    gaps, gap = [], 0
    for drafts in drafted_passes(Backoff(patience=2, longest=8), []):
        gap = gap + 1 if not drafts else 0
        gaps.append(gap)
    assert gaps[:24] == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3]
    assert max(gaps) == 8


def test_one_accepted_draft_ends_it():
    backoff = Backoff(patience=2, longest=8)
    assert drafted_passes(backoff, [0, 0, 0, 3, 0, 0])[:9] == [
        *(True, True, False, True, False, False),
        *(True, True, True),
    ]


def test_a_silent_drafter_is_asked_again_sooner():
    silent = Backoff(patience=1, longest=16)
    rests = []
    for _ in range(6):
        silent.learn(accepted=0, drafted=0)
        rests.append(sum(1 for _ in iter(silent.rests, False)))
    assert rests == [1, 2, 4, 4, 4, 4]


def test_success_never_rests():
    assert all(drafted_passes(Backoff(), [1] * 40))


class Counting(OracleChainDrafter):
    asked = 0

    def propose(self, state, max_nodes):
        self.asked += 1
        return super().propose(state, max_nodes)


def test_generation_asks_a_hopeless_drafter_rarely_and_stays_right():
    model = tiny_llama(seed=0, eos=False)
    inputs = random_prompts(model, 1)
    options = {**inputs, "max_new_tokens": 80, "do_sample": False}
    expected = model.generate(**options)
    wrong = [(token + 1) % 128 for token in expected[0, inputs["input_ids"].shape[1] :].tolist()]
    hopeless = Counting([wrong], depth=3)
    assert torch.equal(specfuse.generate(model, hopeless, **options), expected)
    assert hopeless.asked <= 4 + 4 + 80 // 17
    right = Counting([[token - 1 for token in wrong]], depth=1)
    generator = specfuse.SpeculativeGenerator(model, right)
    generator.generate(**options)
    assert generator.last_stats.passes - 1 <= right.asked <= generator.last_stats.passes
