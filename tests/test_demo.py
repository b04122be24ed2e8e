"""The demo: what is asked, what its figures mean, that all systems say the same, and the page it writes."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from specfuse import demo
from specfuse.cli.main import run
from specfuse.data import miniature
from specfuse.data.world import FACTUAL, Question, clip, split
from specfuse.demo import GENERATE, LOOKUP, SPECFUSE, SYSTEMS, Answered, Contest, DemoResult, Timed
from specfuse.demo_page import coloured, write_page
from specfuse.drafters import CorpusDrafter
from specfuse.stats import GenerationStats
from specfuse.train.build import build_model, build_processor
from specfuse.train.presets import preset
from specfuse.train.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("micro")
    tokenizer = train_tokenizer(clip(3).questions, 300)
    model = build_model(preset("micro"), tokenizer, seed=1)
    model.save_pretrained(path)
    build_processor(tokenizer).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "LONGEST", 12)


def contest_on(directory: Path, max_nodes: int | str = 8) -> Contest:
    from specfuse.models.checkpoint import load_video_llava

    model, processor = load_video_llava(directory, dtype=torch.float32)
    return Contest(model, processor, CorpusDrafter(), max_nodes)


# ---------------------------------------------------------------- what is asked


def test_held_out_clips_are_asked_descriptions_and_facts_in_turn() -> None:
    chosen = demo.choose(2, 6, seed=5)
    assert {asked.index for asked in chosen} <= set(split("held_out").tolist())
    for asked in chosen:
        assert [question.factual for question in asked.questions] in ([False, True] * 3, [True, False] * 3)
        assert len({question.text for question in asked.questions}) == 6
        assert np.array_equal(asked.frames, clip(asked.index).frames)
    again, other = demo.choose(2, 6, seed=5), demo.choose(2, 6, seed=6)
    assert [a.questions for a in again] == [a.questions for a in chosen]
    assert [a.index for a in other] != [a.index for a in chosen]


def test_more_questions_than_descriptions_go_on_with_facts() -> None:
    (asked,) = demo.choose(1, demo.MOST_QUESTIONS, seed=1)
    kinds = [question.kind for question in asked.questions]
    assert len(kinds) == demo.MOST_QUESTIONS and set(kinds[12:]) <= set(FACTUAL)


@pytest.mark.parametrize(
    ("clips", "questions", "text"),
    [
        (0, 3, "clips must be from 1 to 1042, got 0"),
        (1043, 3, "got 1043"),
        (1, 0, "questions must be from 1 to 14, got 0"),
        (1, 15, "got 15"),
    ],
)
def test_numbers_out_of_range(clips: int, questions: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        demo.choose(clips, questions, 0)


# ---------------------------------------------------------------- what the figures mean


def answered(index: int, turn: int, ours: Timed, plain: Timed, lookup: Timed | None = None) -> Answered:
    question = Question("weather", "What is the weather like?", "", "", "fog")
    timed = {GENERATE: plain, LOOKUP: lookup or plain, SPECFUSE: ours}
    return Answered(index, question, turn, timed, GenerationStats())


def test_figures_are_medians_of_ratios_and_ratios_of_sums() -> None:
    plain = Timed([1, 2, 3, 4], 4, 1.0, 0.2)
    result = DemoResult(
        [
            answered(7, 0, Timed([1, 2, 3, 4], 4, 1.0, 0.4), plain),
            answered(7, 1, Timed([1, 2, 3, 4], 2, 0.25, 0.1), plain),
            answered(8, 0, Timed([1, 2, 3, 4], 2, 0.5, 0.2), plain, Timed([1, 2, 3, 4], 4, 1.5, 0.5)),
            answered(8, 1, Timed([1, 2, 3, 4], 2, 0.25, 0.15), plain),
            answered(8, 2, Timed([1, 2, 3, 4], 2, 0.25, 0.05), plain),
        ]
    )
    assert result.identical
    assert result.speedup(GENERATE) == 4.0
    assert result.total_speedup(GENERATE) == pytest.approx(5.0 / 2.25)
    assert result.total_speedup(LOOKUP) == pytest.approx(5.5 / 2.25)
    assert result.tokens_per_pass() == 20 / 12 and result.tokens_per_pass(GENERATE) == 1.0
    assert result.ttft_second_question_ratio == pytest.approx(0.5)  # of 0.25 and 0.75
    assert result.decode_speedup(GENERATE) == pytest.approx(0.8 / 0.2)
    assert result.first_token_seconds(SPECFUSE, later=True) == 0.1
    assert result.tokens_per_second(GENERATE) == 4.0
    result.answered.append(answered(9, 0, Timed([1, 2, 3], 2, 0.5, 0.2), plain))
    assert not result.identical


def test_one_question_a_clip_has_no_second() -> None:
    plain = Timed([1], 1, 1.0, 0.2)
    result = DemoResult([answered(7, 0, plain, plain)])
    assert result.ttft_second_question_ratio is None
    assert result.as_dict()["systems"][SPECFUSE]["first_token_seconds_later_questions"] is None


# ---------------------------------------------------------------- the contest


@pytest.mark.parametrize("max_nodes", [8, "auto"])
def test_all_systems_say_the_same_and_videos_are_encoded_once(directory: Path, max_nodes: int | str) -> None:
    contest = contest_on(directory, max_nodes)
    told = []
    chosen = demo.choose(2, 3, seed=2)
    result = demo.run_demo(contest, chosen, tell=lambda so_far, asked: told.append(asked.index))
    assert told == [asked.index for asked in chosen for _ in range(3)]
    assert result.identical and len(result.answered) == 6
    assert (result.hits, result.misses) == (4, 2)
    for each in result.answered:
        assert each.timed[GENERATE].passes == len(each.timed[GENERATE].tokens)
        assert each.timed[SPECFUSE].passes == each.stats.passes
        assert len(each.stats.from_drafts[0]) == len(each.timed[SPECFUSE].tokens)
        assert all(0 < t.first_seconds < t.seconds for t in each.timed.values())
    assert not hasattr(contest.plain.forward, "cache"), "model.generate runs on the model as it was"


def test_another_system_begins_each_time(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contest = contest_on(directory)
    order: list[str] = []
    timed = Contest._timed

    def noted(self: Contest, system: str, *arguments: object) -> Timed:
        order.append(system)
        return timed(self, system, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Contest, "_timed", noted)
    (asked,) = demo.choose(1, 3, seed=2)
    for turn in range(3):
        contest.answer(asked, turn)
    assert order[::3] == list(SYSTEMS)
    assert sorted(order) == sorted(3 * list(SYSTEMS))


# ---------------------------------------------------------------- the page


def test_pieces_of_an_answer_join_to_its_text(directory: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    text = " A café — with <b>& 2 cars.</s>"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    flags = [place % 2 == 0 for place in range(len(tokens))]
    pieces = coloured(tokens, flags, tokenizer)
    assert "".join(piece for piece, _ in pieces) == text.removesuffix("</s>")
    assert pieces[0][1] and not pieces[1][1]


def test_the_page_holds_everything(directory: Path) -> None:
    contest = contest_on(directory)
    chosen = demo.choose(1, 2, seed=3)
    result = demo.run_demo(contest, chosen)
    page = write_page(result, chosen, contest.processor.tokenizer, "a <slow> computer")
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page)
    pictures = [
        np.array(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r"data:image/png;base64,([^\"]+)", page)
    ]
    assert np.array_equal(pictures[0], np.concatenate(list(chosen[0].frames), axis=1))
    assert {tuple(colour) for colour in pictures[1].reshape(-1, 3).tolist()} == {
        (255, 255, 255),
        (255, 0, 0),
        (0, 0, 255),
    }
    assert "a &lt;slow&gt; computer" in page and "the same tokens" in page
    drafted = sum(each.stats.accepted for each in result.answered)
    assert page.count('<span class="draft">') - 1 <= drafted
    assert all(question.text in page for question in chosen[0].questions)
    result.answered[0].timed[LOOKUP] = result.answered[0].timed[LOOKUP]._replace(tokens=[1])
    assert "NOT the same tokens" in write_page(result, chosen, contest.processor.tokenizer, "")


# ---------------------------------------------------------------- the command


def test_json_alone_on_stdout(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "demo.html"
    options = ["--clips", "1", "--questions", "2", "--model", str(directory), "--html", str(page)]
    assert run(["demo", *options, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["identical"] is True and printed["questions"] == 2 and "1 thread," in printed["versions"]
    for key in ("speedup_vs_generate", "speedup_vs_prompt_lookup", "tokens_per_pass"):
        assert printed[key] > 0
    assert 0 < printed["ttft_second_question_ratio"] < 2
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert run(["demo", *options]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "the same in all three" in text and "vision cache: 1 hits, 1 misses" in text


def test_other_tokens_are_a_failed_check(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = Contest._generate

    def wrong(self: Contest, system: str, *arguments: object) -> torch.Tensor:
        sequences = generate(self, system, *arguments)  # type: ignore[arg-type]
        if system == SPECFUSE:
            sequences[0, -1] += 1
        return sequences

    monkeypatch.setattr(Contest, "_generate", wrong)
    options = ["--clips", "1", "--questions", "1", "--model", str(directory)]
    assert run(["demo", *options, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["identical"] is False
    assert run(["demo", *options]) == 1
    assert "NOT THE SAME" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--nodes", "many"], "--nodes must be a number from 1 to 1023 or auto, got 'many'"),
        (["--nodes", "0"], "--nodes must be"),
        (["--clips", "2000"], "clips must be from 1 to 1042, got 2000"),
        (["--questions", "99"], "questions must be from 1 to 14, got 99"),
        (["--seed", "-1"], "--seed must be 0 or above, got -1"),
        (["--html", "."], "--html must be a file in an existing directory, got '.'"),
        (["--html", "nowhere/demo.html"], "--html must be"),
        (["--model", "nowhere"], "nowhere: no such model directory"),
        (["--corpus", "nowhere"], "nowhere: No such file"),
    ],
)
def test_mistakes_are_told_in_one_line(
    options: list[str], text: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["demo", "--model", str(directory), *options]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_without_shipped_models_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(miniature.load_target, "__defaults__", (tmp_path,))
    assert run(["demo"]) == 2
    assert "this model does not come with the package yet" in capsys.readouterr().err


def test_an_interrupt_leaves_one_line_and_no_page(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = Contest.answer

    def stopped(self: Contest, *arguments: object) -> Answered:
        if self.asked == 4:
            raise KeyboardInterrupt
        return answer(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Contest, "answer", stopped)
    page = tmp_path / "demo.html"
    options = ["--clips", "1", "--questions", "3", "--model", str(directory), "--html", str(page), "--json"]
    assert run(["demo", *options]) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines()[-1] == "specfuse: error: interrupted"
    assert not page.exists()
