"""specfuse align report: its figures, their controls, and what drafts along answers are worth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_pair_cases import D, N, V, W, decoded, tokens, vectors

from specfuse.adapters import LinearAdapter
from specfuse.train.acceptance import block_figures
from specfuse.train.adapter_card import markdown, note
from specfuse.train.adapter_losses import build_adapter
from specfuse.train.adapter_pairs import Pairs
from specfuse.train.adapter_report import PUBLISHED, THRESHOLDS, align_report, at_least, describe


def test_figures_of_known_scores() -> None:
    scores = torch.tensor([0.4, 0.5, 0.62, 0.8, 0.93])
    found = describe(scores)
    assert found["mean"] == pytest.approx(0.65, abs=1e-4) and found["std"] == pytest.approx(0.1933, abs=1e-4)
    assert (found["min"], found["max"], found["percentiles"][50]) == (0.4, 0.93, 0.62)
    assert found["accepted"] == dict(zip(THRESHOLDS, (0.8, 0.6, 0.4, 0.4, 0.2, 0.2, 0.0), strict=True))
    every = at_least(PUBLISHED["after"])
    assert all(every.values()) and len(every) == 15
    worse = {**PUBLISHED["after"], "mean": 0.88, "accepted": {**PUBLISHED["after"]["accepted"], 0.8: 0.85}}
    assert [name for name, reached in at_least(worse).items() if not reached] == ["mean", ">= 0.8"]


def test_report_compares_with_the_target_and_with_knowing_nothing() -> None:
    pairs = vectors()
    adapter = LinearAdapter(W, D)
    held, train = pairs.target[pairs.held_out], pairs.target[pairs.part("train")]
    report = align_report(adapter.eval(), pairs)
    with torch.no_grad():
        after = F.cosine_similarity(adapter(pairs.source[pairs.held_out]), held)
    assert report["after"]["mean"] == pytest.approx(after.mean().item(), abs=1e-4)
    before = F.cosine_similarity(F.pad(pairs.source[pairs.held_out], (0, D - W)), held)
    assert report["before"]["mean"] == pytest.approx(before.mean().item(), abs=1e-4)
    assert report["before_rule"] == "the drafter's 10 features, followed by 2 zeros"
    constant = F.cosine_similarity(train.mean(0).expand_as(held), held)
    assert report["constant"]["mean"] == pytest.approx(constant.mean().item(), abs=1e-4)
    # The targets share a large mean, so that knowing nothing scores high and centred figures tell apart.
    assert report["constant"]["mean"] > 0.7 and abs(report["centred"]["before"]) < 0.3
    assert report["samples"] == 40 and report["clips"] == 20


def test_report_says_how_often_tokens_agree() -> None:
    same, other = decoded(same=True), decoded()
    agreed = align_report(build_adapter("residual-mlp", same, 0).eval(), same)["tokens"]
    assert agreed["match"] == agreed["accepted"] == {"before": 1.0, "after": 1.0}
    assert agreed["match_at"][0.95] == {"share": 1.0, "match": 1.0} and "chain" not in agreed
    held = other.held_out
    said, wanted = (x[held] @ other.target_head.T for x in (other.source, other.target))
    expected = (said.argmax(-1) == wanted.argmax(-1)).double().mean().item()
    overlap = torch.minimum(said.softmax(-1), wanted.softmax(-1)).sum(-1).mean().item()
    report = align_report(build_adapter("token-alignment", other, 0).eval(), other)
    found = report["tokens"]
    for when in ("before", "after"):
        assert found["match"][when] == pytest.approx(expected, abs=1e-4) and expected < 0.5
        assert found["accepted"][when] == pytest.approx(overlap, abs=1e-4)
    probabilities = F.cosine_similarity(said.softmax(-1), wanted.softmax(-1)).mean().item()
    assert report["after"]["mean"] == pytest.approx(probabilities, abs=1e-4) and not report["at_least"]


def test_report_replays_chains_along_answers() -> None:
    # Logits, four answers of ten tokens; the drafter is wrong about every third token of each.
    wanted = torch.arange(40) % V
    said = (wanted + (torch.arange(40) % 10 % 3 == 2)) % V
    clips = torch.arange(40) // 10
    logits = [9 * F.one_hot(tokens, V).float() for tokens in (said, wanted)]
    pairs = Pairs(*logits, clips, clips > 1, answers=clips)
    chain = align_report(build_adapter("token-alignment", pairs, 0).eval(), pairs)["tokens"]["chain"]
    # Passes end behind tokens 2, 5 and 8 and at the end.
    assert chain["before"] == chain["after"] and chain["after"]["tokens_per_pass"] == 2.5
    assert chain["after"]["acceptance_1"] == 0.7


def test_blocks_are_replayed_from_where_the_last_one_ended() -> None:
    one = [[True, False], [False, True], [True, True], [True, True], [False, False], [False, True]]
    # Runs 1, 0, 2, 2, 0, 0: passes at 0, 2 and 5.
    assert block_figures([one]) == {"tokens_per_pass": 2.0, "right_in_a_row": 0.833}
    assert block_figures([one, [[False, False]] * 6])["tokens_per_pass"] == pytest.approx(12 / 9, abs=1e-3)
    assert block_figures([]) == {"tokens_per_pass": 0.0, "right_in_a_row": 0.0}


def test_tokens_of_the_target_are_a_control_of_their_own() -> None:
    found = tokens()
    found.context = found.target + 0.1
    report = align_report(build_adapter("cross-attention", found, 0).eval(), found)
    held = found.held_out
    expected = F.cosine_similarity(found.context[held], found.target[held], dim=-1).mean().item()
    assert report["context"]["mean"] == pytest.approx(expected, abs=1e-4)
    assert "| context |" in markdown(report) and "given, as they are" in note(report)
    found.context = found.context[:, :3]
    assert "context" not in align_report(build_adapter("cross-attention", found, 0).eval(), found)


def test_the_constant_of_tokens_is_one_of_each_place() -> None:
    found = tokens()
    found.target = torch.eye(4, D).expand(N, 4, D) + 0.01 * found.target
    report = align_report(build_adapter("cross-attention", found, 0).eval(), found)
    assert report["constant"]["mean"] > 0.99
    one = found.target.flatten(0, 1).mean(0)
    assert F.cosine_similarity(one.expand_as(found.target), found.target, dim=-1).mean() < 0.6
