"""Plans on targets whose costs are set by sleeping and drafts of known worth: the answer is known."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import random_prompts, tiny_llama

import specfuse
from specfuse.cli.main import run
from specfuse.drafters import Drafter
from specfuse.plan import _Curve, _Record, _tokens_per_pass
from specfuse.probe import Pass, Probe
from specfuse.speedup import WHY_THEY_DIFFER, simplified_speedup, standard_speedup
from specfuse.tree import TokenTree

NEW_TOKENS = 30


def slow(model, cost_ms: Callable[[int], float]):
    """The model, with passes over n tokens that take ``cost_ms(n)`` longer."""
    forward = model.forward

    @functools.wraps(forward)
    def sleeping(*args, **kwargs):
        time.sleep(cost_ms(kwargs["input_ids"].shape[1]) / 1e3)
        return forward(*args, **kwargs)

    model.forward = sleeping
    return model


class KnownChains(Drafter):
    """Chains as long as allowed, of which the first ``right`` tokens are right."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], right: int, sleep_ms: float = 0.0):
        self.known, self.right, self.sleep_ms = answers, right, sleep_ms
        self.seen: list[list[int]] = []

    def propose(self, state, max_nodes):
        time.sleep(self.sleep_ms / 1e3)
        chains = []
        for prompt, done in zip(state.prompts, state.answers, strict=True):
            coming = self.known[tuple(prompt)][len(done) :][:max_nodes]
            wrong = [(token + 1) % 128 for token in coming[self.right :]]
            chains.append(coming[: self.right] + wrong)
        return TokenTree.from_chains([state.root(b) for b in range(state.batch_size)], chains)

    def observe(self, tokens, question=()):
        self.seen.append(list(tokens))


def known_world(questions: int = 2):
    """A target that never stops by itself, its sample, and what it says."""
    model = tiny_llama(seed=0, eos=False)
    sample, answers = [], {}
    for seed in range(questions):
        inputs = {**random_prompts(model, 1, seed=seed), "do_sample": False}
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
        prompt = inputs["input_ids"][0].tolist()
        answers[tuple(prompt)] = output[0, len(prompt) :].tolist()
        sample.append(inputs)
    return model, sample, answers


def make_plan(model, sample, drafter, nodes, **options):
    return specfuse.plan(model, sample, drafter, nodes, max_new_tokens=NEW_TOKENS, rounds=5, **options)


def test_a_middle_size_wins_where_wide_passes_cost_more():
    model, sample, answers = known_world()
    slow(model, lambda n: 8.0 if n <= 9 else 8.0 + 1.5 * (n - 9))
    found = make_plan(model, sample, KnownChains(answers, right=8), (2, 8, 24))
    two, eight, many = found.rows
    assert found.best_nodes == 8 and found.best is eight
    # 30 tokens: one from the prompt's pass with its drafts, then as many as allowed a pass.
    assert 2.5 < two.tokens_per_pass <= 3 and 6 < eight.tokens_per_pass <= 9
    assert many.tokens_per_pass == eight.tokens_per_pass
    assert many.full_pass_ms > eight.full_pass_ms + 15
    assert eight.speedup > 3 and eight.speedup > two.speedup and eight.speedup > many.speedup
    assert eight.acceptance == (1.0,) * 8
    assert many.acceptance[:8] == (1.0,) * 8 and set(many.acceptance[8:]) <= {0.0}
    assert eight.measured > 1
    assert "max_nodes=8" in str(found) and "Speculate" in found.verdict


def test_it_says_no_where_wide_passes_cost_too_much():
    model, sample, answers = known_world()
    slow(model, lambda n: 4.0 if n == 1 else 10.0 * n)
    found = make_plan(model, sample, KnownChains(answers, right=1), (2, 4))
    assert found.best_nodes is None and found.best is None
    assert all(row.tokens_per_pass == 2 and row.speedup < 0.9 for row in found.rows), str(found)
    # The formulas for chains do not know what a wide pass costs.
    assert all(row.standard > 1 and row.simplified > 1 for row in found.rows)
    assert found.verdict.startswith("Do not speculate") and found.verdict in str(found)


def test_it_says_no_where_drafting_costs_too_much():
    model, sample, answers = known_world()
    slow(model, lambda n: 4.0)
    found = make_plan(model, sample, KnownChains(answers, right=1, sleep_ms=20.0), (1, 2))
    assert found.best_nodes is None
    assert all(row.draft_ms > 10 and row.speedup < 0.9 for row in found.rows)


def test_it_says_no_where_nothing_comes_true():
    model, sample, answers = known_world()
    slow(model, lambda n: 4.0 + 2.0 * (n - 1))
    found = make_plan(model, sample, KnownChains(answers, right=0), (4, 16))
    assert found.best_nodes is None
    for row in found.rows:
        assert row.tokens_per_pass == 1 and row.alpha == 0 and row.acceptance == (0.0,)
        assert row.speedup < 1


def test_every_setting_meets_a_drafter_that_has_learned_the_answers_before_once():
    model, sample, answers = known_world(questions=3)
    drafter = KnownChains(answers, right=2)
    found = make_plan(model, sample, drafter, (2, 4))
    assert drafter.seen == list(answers.values())
    assert found.answers == 3 and found.device == "cpu" and found.dtype == "float32"
    assert found.prompt_tokens == sample[0]["input_ids"].shape[1]


def test_auto_starts_cold_and_leaves_the_models_own_drafter_alone():
    model, sample, _ = known_world()
    sample += sample[:1]  # a question asked again is what a corpus can predict
    found = make_plan(model, sample, "auto", (4,))
    (row,) = found.rows
    assert 1 < row.tokens_per_pass < 3
    assert len(specfuse.auto_drafter(model).drafters[0]) == 0
    assert make_plan(model, sample, "auto", (4,)).rows[0].tokens_per_pass == row.tokens_per_pass


def test_sampled_and_batched_inputs():
    model = tiny_llama(seed=0, eos=False)
    sample = [{**random_prompts(model, 2), "do_sample": True, "temperature": 0.8}] * 2
    found = make_plan(model, sample, "corpus", (4,))
    assert found.answers == 4 and found.rows[0].tokens_per_pass > 1


def test_a_plan_is_data():
    model, sample, _ = known_world()
    found = make_plan(model, sample, "lookup", [4, 2, 4])
    data = json.loads(json.dumps(found.as_dict()))
    assert [row["nodes"] for row in data["rows"]] == [2, 4]
    assert data["best_nodes"] == found.best_nodes and data["verdict"] == found.verdict


def test_steps_are_told():
    model, sample, _ = known_world()
    steps = []
    make_plan(model, sample, "lookup", (2, 4), progress=lambda: steps.append(1))
    assert len(steps) == 1 + 2 * 3


def test_a_probe_changes_no_token():
    model, sample, answers = known_world(1)
    probe = Probe(model, KnownChains(answers, right=3), 5)
    (answer,) = probe.run({**sample[0], "max_new_tokens": NEW_TOKENS})
    assert [answer] == list(answers.values())
    # The prompt's pass emits 4 tokens, and the others have the rest.
    assert sum(each.emitted for each in probe.passes) == NEW_TOKENS - 4
    assert probe.offered[1] == len(probe.passes) and probe.accepted[4] == 0 < probe.offered[4]


def arguments(directory: Path, *more: object) -> list[str]:
    video = directory / "example.gif"
    options = ["--model", directory, "--video", video, "--max-new-tokens", 12, "--rounds", 3]
    return ["plan", *map(str, [*options, *more])]


def test_the_command_asks_every_question_about_every_video(tiny_directory: Path, capsys) -> None:
    video = tiny_directory / "example.gif"
    more = ["--video", video, "--question", "What happens?", "--question", "How many?", "--nodes", "2,5"]
    assert run(arguments(tiny_directory, *more, "--drafter", "lookup", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"] == 4 and [row["nodes"] for row in found["rows"]] == [2, 5]
    assert found["random_weights"] is True and found["drafter"] == "lookup"
    assert found["plain_ms"] > 0 and found["prompt_tokens"] > 100


def test_the_command_prints_a_table_and_a_verdict(tiny_directory: Path, capsys) -> None:
    assert run(arguments(tiny_directory, "--question", "What happens?", "--nodes", 3)) == 0
    printed = capsys.readouterr().out
    assert "T(1) = " in printed and "peculate" in printed and WHY_THEY_DIFFER in printed
    assert "weights are random" in printed


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--question", "Why?", "--nodes", "4,x"], "--nodes"),
        (["--question", "Why?", "--nodes", "0"], "--nodes"),
        (["--question", "Why?", "--drafter", "none"], "--drafter none"),
        (["--question", "Why?", "--drafter", "nowhere"], "--drafter must be"),
        (["--question", "a <video>"], "<video>"),
        ([], "--question"),
    ],
)
def test_the_command_refuses_in_one_line(more, text, tiny_directory: Path, capsys) -> None:
    assert run(arguments(tiny_directory, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("specfuse: error: ") and text in line


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"inputs": []}, "inputs must hold at least one"),
        ({"inputs": {"input_ids": torch.ones(1, 4, dtype=torch.int64)}}, "sequence of mappings"),
        ({"inputs": [torch.ones(1, 4)]}, "sequence of mappings"),
        ({"drafter": "oracle"}, "oracle"),
        ({"drafter": None}, "drafter must draft"),
        ({"nodes": ()}, "nodes"),
        ({"nodes": (0, 4)}, "(0, 4)"),
        ({"nodes": (1024,)}, "1024"),
        ({"nodes": (2.5,)}, "2.5"),
        ({"rounds": 2}, "rounds"),
        ({"max_new_tokens": 1}, "max_new_tokens"),
    ],
)
def test_bad_input_is_refused(change, text):
    model = tiny_llama(seed=0)
    options = {"inputs": [random_prompts(model, 1)], "drafter": "lookup", "nodes": (2,)} | change
    with pytest.raises(ValueError) as caught:
        specfuse.plan(model, **options)
    assert text in str(caught.value)


def test_answers_of_one_token_can_not_be_measured():
    model, sample, _ = known_world(1)
    first = model.generate(**sample[0], max_new_tokens=1)[0, -1].item()
    with pytest.raises(ValueError, match="ends with its first token"):
        specfuse.plan(model, [{**sample[0], "eos_token_id": first}], "lookup", (2,), rounds=3)


@pytest.mark.parametrize(
    ("alpha", "gamma", "cost", "standard", "simplified"),
    [
        (0.5, 2, 0.1, 1.75 / 1.2, 2 / 1.1),  # 1 + 1/2 + 1/4
        (0.8, 4, 0.0, 3.3616, 4.0),
        (1.0, 5, 0.2, 6 / 2, 5.0),
        (0.0, 4, 0.25, 0.5, 2.0),  # nothing accepted: half as fast, and the simplified one says twice
        (0.7, 0, 0.3, 1.0, 0.0),
    ],
)
def test_formulas_by_hand(alpha, gamma, cost, standard, simplified):
    assert standard_speedup(alpha, gamma, cost) == pytest.approx(standard)
    assert simplified_speedup(alpha, gamma, cost) == pytest.approx(simplified)
    assert standard_speedup(1 - 1e-9, 5, 0.2) == pytest.approx(3.0)
    assert "1 + a + ... + a^g" in WHY_THEY_DIFFER


@pytest.mark.parametrize(
    ("alpha", "gamma", "cost"), [(1.1, 4, 0.1), (-0.1, 4, 0.1), (0.5, -1, 0.1), (0.5, 4, -1)]
)
def test_formulas_refuse_what_is_no_chance_length_or_cost(alpha, gamma, cost):
    for formula in (standard_speedup, simplified_speedup):
        with pytest.raises(ValueError, match=r"alpha|gamma|cost_ratio"):
            formula(alpha, gamma, cost)


def test_errors_by_hand():
    curve = _Curve({0: [1.0, 2.0, 3.0], 4: [5.0, 6.0, 70.0]})
    assert curve.at(1) == 2 and curve.at(5) == 6 and curve.at(3) == 4
    assert curve.error(1) == pytest.approx(1.2533 * 1.4826 / 3**0.5) == curve.error(5)
    emitted = [1, 3, 1, 3]
    passes = [Pass(2, 1, 1, count, 0.0, 1.0) for count in emitted]
    mean, error = _tokens_per_pass([_Record(passes, None, None, 1, 1)])
    assert mean == 2 and error == pytest.approx((4 / 3) ** 0.5 / 2)  # the standard error of a mean
    # Five answers whose passes are all alike within: the answers are the units, and the error is larger.
    answers = [_Record([Pass(2, 1, 1, k, 0.0, 1.0)] * 10, None, None, 1, 1) for k in (1, 1, 2, 3, 3)]
    assert _tokens_per_pass(answers)[1] == pytest.approx(1.0 / 5**0.5)
