"""The end-to-end benchmarks: what a replay makes models say, what is compared, rows and plots."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_benchmarks import module

from specfuse.data.recording import Recording, Sample

ANSWERS = [[5, 9, 5, 9, 77, 8, 4, 31000], [5, 9, 5, 9, 77, 8, 6, 12], [5, 9, 5, 9, 77, 8, 4, 31000]]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    names = ("contest", "inputs", "lineups", "replayed", "shapes", "simulated", "systems", "table")
    loaded = {name: module(f"end_to_end.{name}", monkeypatch) for name in names}
    shapes = loaded["shapes"]
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.Shape(32, 64, 1, 2, 2, 32, 1))
    return SimpleNamespace(**loaded)


def replay(parts: SimpleNamespace, nodes: tuple[int, ...] = (4,)) -> tuple[Any, list[Any], list[Any]]:
    """A replayed model, the competitors, and three answers with their second questions."""
    prompt = parts.shapes.PROMPTS[171]
    model = parts.shapes.build(parts.shapes.SHAPES["tiny"], prompt, "cpu", torch.float32)
    script = parts.replayed.Script(prompt.tokens + 1024, "cpu")
    script.give(model)
    recording = Recording([Sample(tuple(answer), None, "", "") for answer in ANSWERS], "")
    questions = parts.inputs.replayed_questions(model, prompt, recording, 3, script)
    return model, parts.lineups.replayed_lineup(model, nodes, compiled=False), questions


def answer_of(system: Any, asked: Any, parts: SimpleNamespace) -> list[int]:
    return parts.contest._measured(system, asked)[1]


# ---------------------------------------------------------------- replayed answers


def test_every_system_says_what_was_recorded(parts: SimpleNamespace) -> None:
    _, systems, questions = replay(parts)
    asked = questions[::2]
    names = {system.name for system in systems}
    assert {"model.generate", "HF static cache", "HF prompt lookup", "specfuse, no drafter"} < names
    for system in systems:
        assert [answer_of(system, each, parts) for each in asked] == ANSWERS, system.name
    parts.contest.warm_up(systems, questions[:2], memory=False)


def test_a_remembered_answer_is_accepted_as_recorded(parts: SimpleNamespace) -> None:
    _, systems, questions = replay(parts)
    corpus = next(s for s in systems if s.name == "specfuse, corpus, earlier answers, 4 nodes")
    for asked in questions[::2]:
        answer_of(corpus, asked, parts)
    # The third answer is the first again: its 8 tokens came in fewer passes, all but the roots' as drafts.
    assert corpus.stats.passes <= 3 and corpus.stats.tokens == 8
    assert corpus.stats.accepted == 8 - corpus.stats.passes


def test_without_the_recording_the_model_says_something_else(parts: SimpleNamespace) -> None:
    model, systems, questions = replay(parts)
    model._forward_hooks.clear()
    assert answer_of(systems[0], questions[0], parts) != ANSWERS[0]


def test_a_system_with_other_tokens_is_named(parts: SimpleNamespace) -> None:
    _, systems, questions = replay(parts)

    class Wrong(parts.systems.HuggingFace):
        def answer(self, asked: Any, streamer: Any) -> torch.Tensor:
            sequences = super().answer(asked, streamer)
            sequences[0, -1] += 1
            return sequences

    both = [systems[0], Wrong("a wrong one", systems[0].model)]
    with pytest.raises(
        parts.contest.Differs, match="a wrong one gave other tokens about clip 0, from token 7"
    ):
        parts.contest.warm_up(both, questions[:1], memory=False)
    with pytest.raises(parts.contest.Differs, match="a wrong one"):
        parts.contest.run(both, questions[:1], 1)


def test_questions_lie_evenly_and_what_lies_between_is_earlier(parts: SimpleNamespace) -> None:
    prompt = parts.shapes.PROMPTS[171]
    model = SimpleNamespace(device="cpu", dtype=torch.float32, config=parts.shapes.config_of(
        parts.shapes.SHAPES["tiny"], prompt), forward=lambda pixel_values: None)  # fmt: skip
    recording = Recording([Sample((index, 7), None, "", "") for index in range(10)], "")
    script = parts.replayed.Script(300, "cpu")
    questions = parts.inputs.replayed_questions(model, prompt, recording, 2, script)
    assert [(q.clip, q.turn, q.limit, q.scored) for q in questions] == [
        *((2, 0, 2, True), (2, 1, 1, False), (7, 0, 2, True), (7, 1, 1, False))
    ]
    assert [answer[0] for answer in questions[2].earlier] == [3, 4, 5, 6]
    assert questions[0].inputs["input_ids"].shape == (1, 171)
    questions[2].prepare()
    assert script.table[170:173].tolist() == [7, 7, 0], "clip 7's answer behind a prompt of 171 tokens"
    with pytest.raises(ValueError, match="questions must be from 1 to 10, got 11"):
        parts.inputs.replayed_questions(model, prompt, recording, 11, script)
    with pytest.raises(ValueError, match="do not fit into 300"):
        script.write(290, [1] * 20)


def test_the_question_holds_the_words_that_answers_begin_with(parts: SimpleNamespace) -> None:
    samples = [Sample(tuple(answer), None, "", "") for answer in ANSWERS]
    assert parts.inputs.words_of(samples) == [5, 9, 5, 9, 77, 8, 4, 31000]
    assert parts.inputs.words_of(samples[:2]) == [5, 9, 5, 9, 77, 8]


def test_prompts_are_as_long_as_video_llavas(parts: SimpleNamespace) -> None:
    assert list(parts.shapes.PROMPTS) == [171, 2091, 4643]
    seven = parts.shapes.SHAPES["7b"]
    assert 29e9 < parts.shapes.bytes_needed(seven, parts.shapes.PROMPTS[2091], torch.float16) < 60e9


def test_a_model_too_large_is_refused(parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.shapes, "bytes_free", lambda device: 2**30)
    with pytest.raises(MemoryError, match=r"need about .* GiB in torch.bfloat16, cpu has 1.0 GiB free"):
        parts.shapes.build(parts.shapes.SHAPES["1b"], parts.shapes.PROMPTS[171], "cpu", torch.bfloat16)


# ---------------------------------------------------------------- simulated acceptance


def test_drafts_are_right_as_often_as_asked(parts: SimpleNamespace) -> None:
    answer = list(range(10, 4010))
    for rate in (0.0, 0.3, 0.8, 1.0):
        line = parts.replayed.imperfect(answer, rate, 1, 32000)
        right = [a == b for a, b in zip(answer, line, strict=True)]
        assert sum(right) == 4000 * rate
        # Drawn places: behind a right token the next is right as often as anywhere, within 4 deviations.
        pairs = sum(a and b for a, b in itertools.pairwise(right))
        assert abs(pairs - rate * rate * 3999) <= 4 * (4000 * rate * (1 - rate)) ** 0.5, rate
    assert parts.replayed.imperfect(answer, 0.3, 1, 32000) == parts.replayed.imperfect(answer, 0.3, 1, 32000)
    assert parts.replayed.imperfect(answer, 0.3, 1, 32000) != parts.replayed.imperfect(answer, 0.3, 2, 32000)
    with pytest.raises(ValueError, match=r"rate must be from 0 to 1, got 1\.5"):
        parts.replayed.imperfect(answer, 1.5, 1, 32000)


def test_simulated_drafts_are_accepted_up_to_the_first_wrong_one(parts: SimpleNamespace) -> None:
    model, _, questions = replay(parts)
    drafter = parts.simulated.SimulatedDrafter()
    system = parts.systems.Specfuse("simulated", model, lambda: drafter, 4)
    drafter.line = [*ANSWERS[0][:3], 1, *ANSWERS[0][4:]]
    assert answer_of(system, questions[0], parts) == ANSWERS[0]
    # Drafts 0 to 2 and the target's 3; drafts 4 to 7, of which the last is the target's: no draft is needed.
    assert system.stats.histogram == {4: 2}
    drafter.line = [1] * 8
    assert answer_of(system, questions[0], parts) == ANSWERS[0]
    assert set(system.stats.histogram) == {1}, "nothing is accepted of drafts that are all wrong"


def test_acceptance_curve_puts_the_published_figure_beside(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = module("bench_acceptance_curve", monkeypatch)
    monkeypatch.setattr(bench, "PUBLISHED", bench.PUBLISHED[-1:])
    command = ["--answers", "1", "--new-tokens", "12", "--rounds", "1", "--dtype", "float32"]
    (row,) = bench.main([*command, "--csv", str(tmp_path)])
    assert row["published"] == 2.67 and row["published_cached"]
    assert row["expected"] == pytest.approx((1 - 0.9**17) / 0.1, abs=1e-3)
    assert 1.5 < row["tokens_per_pass"] <= 12
    (written,) = csv.DictReader((tmp_path / "acceptance_curve.csv").open())
    assert written["input"] == "simulated" and written["acceptance"] == "0.9"
    assert bench.Point(1.0, 4).expected == 5 and bench.Point(0.0, 4).expected == 1


# ---------------------------------------------------------------- rows, files, plots


def timed(parts: SimpleNamespace, seconds: float, first: float, tokens: int, **other: Any) -> Any:
    values = {"turn": 0, "scored": True, "passes": tokens, "shares": {}} | other
    return parts.contest.Timed(0, 0, seconds=seconds, first_seconds=first, tokens=tokens, **values)


def test_figures_of_a_row(parts: SimpleNamespace) -> None:
    second = {"turn": 1, "scored": False}
    shares = {"prefill": 0.4, "draft": 0.05, "verify": 0.1, "commit": 0.0}
    found = {
        "model.generate": [
            timed(parts, 1.0, 0.2, 9),
            timed(parts, 2.0, 0.4, 9),
            timed(parts, 3.0, 3.0, 1, **second),
        ],
        "specfuse": [
            timed(parts, 0.4, 0.2, 9, passes=3, shares=shares),
            timed(parts, 0.6, 0.4, 9, passes=3, shares=shares),
            timed(parts, 0.1, 0.1, 1, **second),
        ],
    }
    theirs, ours = parts.table.rows(found, {"specfuse": 3 * 2**20})
    assert (theirs["over_generate"], theirs["decode_over_generate"], theirs["tokens_per_pass"]) == (1, 1, 1)
    assert ours["decode_over_generate"] == 6.0, "the median of 0.8 / 0.2 and 1.6 / 0.2"
    assert ours["total_decode_over_generate"] == 6.0 and ours["total_over_generate"] == 3.0
    assert ours["decode_over_lookup"] == "" and ours["decode_over_plain"] == ""
    assert (ours["first_ms"], ours["second_first_ms"]) == (300.0, 100.0)
    assert (ours["tokens"], ours["tokens_per_s"], ours["decode_tokens_per_s"]) == (18, 18.0, 40.0)
    assert ours["tokens_per_pass"] == 3.0 and ours["peak_mib"] == 3.0
    assert [ours[f"{part}_share"] for part in parts.table.PARTS] == [0.4, 0.05, 0.1, 0.0, 0.45]
    assert (theirs["p20_ms"], theirs["p50_ms"], theirs["p80_ms"]) == (1200.0, 1500.0, 1800.0)


def test_a_run_writes_rows_and_refuses_other_files(
    parts: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bench = module("bench_generate", monkeypatch)
    monkeypatch.setattr(bench, "LENGTHS", (0, 4))
    command = [
        "--trace",
        "example",
        "--questions",
        "2",
        "--longest",
        "6",
        "--rounds",
        "1",
        "--dtype",
        "float32",
    ]
    command += ["--nodes", "4", "--only", "no drafter", "--only", "corpus", "--csv", str(tmp_path)]
    rows = bench.main(command)
    assert [row["system"] for row in rows] == [
        *("model.generate", "specfuse, no drafter", "specfuse, corpus, earlier answers, 4 nodes")
    ]
    assert all(row["tokens"] == 12 and row["identical"] for row in rows)
    assert "replaying adds" in capsys.readouterr().out
    written = list(csv.DictReader((tmp_path / "generate.csv").open()))
    assert [row["system"] for row in written] == [row["system"] for row in rows]
    assert written[0]["input"] == "replayed" and written[0]["prompt_tokens"] == "171"
    assert float(written[0]["peak_mib"]) > 0
    curve = list(csv.DictReader((tmp_path / "pass_times.csv").open()))
    assert [row["drafted"] for row in curve] == ["0", "4"] and curve[0]["ratio"] == "1.0"
    draw(monkeypatch, tmp_path)
    (tmp_path / "generate.csv").write_text("date,benchmark\n")
    with pytest.raises(ValueError, match="has other columns"):
        parts.table.append(tmp_path / "generate.csv", parts.table.ROW, {}, [])


def draw(monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
    """Plots of what was written, where matplotlib is there."""
    pytest.importorskip("matplotlib")
    plot = module("plot_end_to_end", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["plot_end_to_end.py", str(results)])
    plot.main()
    device = "gpu" if torch.cuda.is_available() else "cpu"
    assert "no drafter" in (results / f"latency_{device}.svg").read_text()
    assert (results / f"pass_times_{device}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="nothing measured on a"):
        monkeypatch.setattr(sys, "argv", ["plot_end_to_end.py", str(results / "none")])
        plot.main()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--trace", "missing.json"], "missing.json"),
        (["--trace", "example", "--questions", "100000"], "questions must be from 1 to"),
        (["--clips", "0"], "clips must be from 1 to"),
    ],
)
def test_what_is_wrong_is_named(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: str
) -> None:
    bench: ModuleType = module("bench_generate", monkeypatch)
    monkeypatch.setattr(bench.lineups, "miniature_lineup", lambda *_: [])
    monkeypatch.setattr(bench.inputs, "miniature_questions", lambda *_: [])
    with pytest.raises(SystemExit, match=error):
        bench.main(arguments)


def test_json_is_all_that_is_printed(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = module("bench_generate", monkeypatch)
    command = ["--input", "unpredictable", "--questions", "1", "--longest", "3", "--rounds", "1", "--json"]
    bench.main([*command, "--only", "no drafter", "--no-pass-times", "--dtype", "float32"])
    report = json.loads(capsys.readouterr().out)
    assert report["input"] == "unpredictable" and len(report["rows"]) == 2
