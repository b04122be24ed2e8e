"""Lossy rules: one that never accepts changes nothing, one that always does follows the draft."""

from __future__ import annotations

import copy

import pytest
import torch
from scripted_drafters import OracleDrafter, RandomTreeDrafter
from tiny_models import EOS, random_prompts, tiny_llama

import specfuse
from specfuse.acceptance import AcceptanceRule, Judgement, TypicalAcceptance
from specfuse.acceptance.agreement import token_agreement
from specfuse.drafters import Drafter
from specfuse.tree import TokenTree


class Never(AcceptanceRule):
    name = "never"

    def judge(self, scored):
        return Judgement()


class Always(AcceptanceRule):
    """Keeps whatever was drafted, the likeliest first."""

    name = "always"

    def judge(self, scored):
        class First(Judgement):
            def overrule(self, row, path):
                return scored.children[row][path[-1]][:1]

        return First()


class Fixed(Drafter):
    """Chains of the same tokens for every row, whatever was said."""

    def __init__(self, tokens):
        self.tokens = tokens

    def propose(self, state, max_nodes):
        roots = [state.root(b) for b in range(state.batch_size)]
        return TokenTree.from_chains(roots, [self.tokens[:max_nodes]] * len(roots))


SAMPLED = {"do_sample": True, "top_k": 20}
CALLS = [
    {},
    SAMPLED,
    {"repetition_penalty": 1.3},
    {**SAMPLED, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
]


def answers(model, drafter, **kwargs):
    return specfuse.generate(model, drafter, max_new_tokens=20, return_dict_in_generate=True, **kwargs)


@pytest.mark.parametrize("call", CALLS, ids=["greedy", "sampled", "penalty", "sampled-processors"])
def test_a_rule_that_never_accepts_changes_nothing(call):
    model = tiny_llama(dtype=torch.float64)
    kwargs = {**random_prompts(model, 3), "seed": 5, **call}
    keep = {"output_scores": True, "output_logits": True}
    length = kwargs["input_ids"].shape[1]
    plain = answers(model, None, **kwargs)
    for seed in range(3):
        oracle = OracleDrafter(plain.sequences[:, length:].tolist(), vocab=128, seed=seed)
        exact = answers(model, copy.deepcopy(oracle), **kwargs, **keep)
        walked = answers(model, copy.deepcopy(oracle), accept=Never(), **kwargs, **keep)
        assert torch.equal(walked.sequences, plain.sequences)
        assert walked.stats.histogram == exact.stats.histogram, "as many tokens per pass"
        assert walked.stats.accepted > 0
        for mine, its in zip(walked.scores + walked.logits, exact.scores + exact.logits, strict=True):
            torch.testing.assert_close(mine, its)
        assert walked.acceptance["overruled"] == 0 and walked.acceptance["lossless"] is False


def test_exact_is_the_default_and_says_so():
    model = tiny_llama()
    output = answers(model, "lookup", **random_prompts(model, 1))
    assert output.acceptance == {"rule": "exact", "lossless": True}
    other = answers(model, "lookup", accept="exact", **random_prompts(model, 1))
    assert torch.equal(output.sequences, other.sequences)


@pytest.mark.parametrize("call", CALLS[:2], ids=["greedy", "sampled"])
def test_a_rule_that_accepts_everything_follows_the_draft(call):
    model = tiny_llama(eos=False)
    kwargs = {**random_prompts(model, 2), **call}
    output = answers(model, Fixed([50, 51, 52]), accept=Always(), seed=0, **kwargs)
    said = output.sequences[:, kwargs["input_ids"].shape[1] :]
    for row in said.tolist():
        # Three drafts, the target's own token, three drafts ...
        assert [row[i : i + 3] for i in range(0, 20, 4)] == [[50, 51, 52]] * 5
    label = output.acceptance
    lossless = answers(model, None, seed=0, **kwargs)
    assert not torch.equal(output.sequences, lossless.sequences)
    assert label["tokens"] == 40 and 0 < label["overruled"] <= 30
    assert label["measured_agreement"] == 1 - label["overruled"] / 40


def test_what_was_cut_off_is_not_counted():
    model = tiny_llama(eos=False)
    output = specfuse.generate(
        model,
        Fixed([50, 51, 52, 53, 54]),
        accept=Always(),
        **random_prompts(model, 1),
        max_new_tokens=3,
        return_dict_in_generate=True,
    )
    assert output.acceptance["tokens"] == 3 and output.acceptance["overruled"] <= 3


def test_where_an_answer_ends_stays_with_the_target():
    model = tiny_llama(eos=False)
    model.generation_config.eos_token_id = EOS
    inputs = random_prompts(model, 1)
    length = inputs["input_ids"].shape[1]
    # A drafted end is not taken from the draft ...
    output = answers(model, Fixed([50, EOS, 60]), accept=Always(), **inputs)
    assert output.sequences[0, length] == 50 and output.sequences[0, length + 1] != EOS
    # ... and the target's end is not drafted over.
    first = int(answers(model, None, **inputs).sequences[0, length])
    model.generation_config.eos_token_id = first
    ended = answers(model, Fixed([50, 51, 52]), accept=Always(), **inputs)
    assert ended.sequences[0, length:].tolist() == [first]


def test_typical_is_what_the_paper_says():
    model = tiny_llama(dtype=torch.float64, eos=False)
    inputs = random_prompts(model, 1)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        p = model(**inputs).logits[0, -1].softmax(-1)
    entropy = -(p * p.log()).sum()
    order = p.argsort(descending=True).tolist()
    for epsilon, delta in ((0.09, 0.3), (0.02, 0.9), (0.9, 0.05)):
        floor = min(epsilon, delta * float(torch.exp(-entropy)))
        rule = TypicalAcceptance(epsilon, delta)
        for token in (*order[1:6], order[-1]):
            said = answers(model, Fixed([token]), accept=rule, **inputs).sequences[0, length]
            assert (said == token) == (p[token] > floor), (epsilon, delta, token)
    assert any(p[t] > min(0.02, 0.9 * float(torch.exp(-entropy))) for t in order[1:6]), "some are accepted"


def test_typical_takes_the_likelier_sibling_and_costs_agreement():
    model = tiny_llama(eos=False)
    inputs = random_prompts(model, 2)
    output = answers(model, RandomTreeDrafter(128), accept=TypicalAcceptance(0.001, 1.0), **inputs)
    assert output.acceptance["rule"] == "typical" and output.acceptance["overruled"] > 0
    strict = answers(model, RandomTreeDrafter(128), accept=TypicalAcceptance(1.0, 1.0), **inputs)
    assert strict.acceptance["settings"] == {"epsilon": 1.0, "delta": 1.0}


@pytest.mark.parametrize("bad", [0.0, -1.0, 1.5, float("nan")])
def test_typical_names_a_bad_threshold(bad):
    with pytest.raises(ValueError, match="epsilon must lie"):
        TypicalAcceptance(epsilon=bad)
    with pytest.raises(ValueError, match="delta must lie"):
        TypicalAcceptance(delta=bad)


@pytest.mark.parametrize("bad", ["lossy", None, 0.8])
def test_an_unknown_rule_is_named(bad):
    with pytest.raises(ValueError, match="accept must be"):
        specfuse.generate(tiny_llama(), None, accept=bad, input_ids=torch.tensor([[1]]))


def test_a_prefix_constraint_is_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn"):
        answers(
            model,
            "lookup",
            accept="typical",
            prefix_allowed_tokens_fn=lambda row, ids: [5, 6],
            **random_prompts(model, 1),
        )


def test_custom_generate_takes_a_rule():
    model = tiny_llama(eos=False)
    inputs = random_prompts(model, 1)
    custom = specfuse.custom_generate(Fixed([50, 51, 52]), accept=Always())
    output = model.generate(**inputs, max_new_tokens=8, custom_generate=custom, return_dict_in_generate=True)
    assert output.acceptance["rule"] == "always" and output.acceptance["overruled"] > 0


def test_logits_that_hold_nan_are_an_error_under_a_rule_too():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(FloatingPointError, match="row 0"):
        answers(model, Fixed([50, 51]), accept=Always(), **random_prompts(model, 1))


@pytest.mark.parametrize(
    ("said", "lossless", "agreement"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 9, 3, 4], [1, 2, 3, 4], 0.75),
        ([1, 3, 4], [1, 2, 3, 4], 0.75),
        ([0, 1, 2, 3], [1, 2, 3, 4], 0.5),
        ([5, 6], [1, 2, 3, 4], 0.0),
        ([], [1], 0.0),
        ([], [], 1.0),
    ],
)
def test_token_agreement(said: list[int], lossless: list[int], agreement: float) -> None:
    assert token_agreement(said, lossless) == token_agreement(lossless, said) == agreement
