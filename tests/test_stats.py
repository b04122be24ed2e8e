"""Which emitted tokens were accepted drafts, as the statistics of a call tell."""

from __future__ import annotations

import torch
from scripted_drafters import OracleChainDrafter
from tiny_models import random_prompts, tiny_llama

import specfuse
from specfuse.stats import GenerationStats

NEW_TOKENS = 20


def stats_with(drafter: specfuse.Drafter | None, answers: list[list[int]], inputs: dict) -> GenerationStats:
    generator = specfuse.SpeculativeGenerator(tiny_llama(seed=0, eos=False), drafter, max_nodes=16)
    got = generator.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert got[:, -NEW_TOKENS:].tolist() == answers
    assert generator.last_stats is not None
    return generator.last_stats


def test_each_row_tells_drafts_from_the_targets_own_tokens() -> None:
    model = tiny_llama(seed=0, eos=False)
    inputs = random_prompts(model, 2)
    answers = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, -NEW_TOKENS:].tolist()
    # Row 0 is drafted rightly, row 1 wrongly from its first token on.
    wrong = [(token + 1) % 100 for token in answers[1]]
    stats = stats_with(OracleChainDrafter([answers[0], wrong], depth=3), answers, inputs)
    assert stats.from_drafts[0] == [True, True, True, False] * 5
    assert stats.from_drafts[1] == [False] * NEW_TOKENS
    assert stats.accepted == stats.as_dict()["accepted"] == 15


def test_plain_decoding_accepts_nothing_and_a_cut_pass_ends_in_a_draft() -> None:
    model = tiny_llama(seed=0, eos=False)
    inputs = random_prompts(model, 1)
    answers = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, -NEW_TOKENS:].tolist()
    assert stats_with(None, answers, inputs).from_drafts == {0: [False] * NEW_TOKENS}
    # 6 + 6 + 6 tokens; of the last 6 only 2 still fit, both drafts.
    stats = stats_with(OracleChainDrafter(answers, depth=5), answers, inputs)
    assert torch.tensor(stats.from_drafts[0]).nonzero().flatten().tolist() == [
        position for position in range(NEW_TOKENS) if position % 6 != 5
    ]
