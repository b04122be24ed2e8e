"""The target's own answers: those of ``model.generate``, and a file that can be interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import randomize

from specfuse.session import FIRST_TURN
from specfuse.train.batches import pixels
from specfuse.train.build import build_model, build_processor
from specfuse.train.clip_store import Clips, load_clips
from specfuse.train.outputs import GROUP, answer_fully, collect_outputs
from specfuse.train.presets import preset
from specfuse.train.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def clips(world_cache: Path) -> Clips:
    return load_clips([1, 4, 5, 7, 9], world_cache)


@pytest.fixture(scope="module")
def tokenizer(clips: Clips):
    return train_tokenizer((q for asked in clips.questions for q in asked), 400)


@pytest.fixture(scope="module")
def target(tokenizer):
    """Random weights that have opinions, and end some answers."""
    model = randomize(build_model(preset("micro"), tokenizer, 0), seed=2).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    return model


@pytest.fixture(scope="module")
def short(monkeypatch_module):
    monkeypatch_module.setattr("specfuse.train.outputs.LONGEST", 6)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_answers_are_those_of_generate(target, tokenizer, clips: Clips) -> None:
    processor = build_processor(tokenizer)
    asked = [[q.text for q in clips.questions[0][:5]], [q.text for q in clips.questions[1][3:10]]]
    answers = answer_fully(target, tokenizer, pixels(clips.frames[:2]), asked, 24)
    ended = 0
    for index, (texts, said) in enumerate(zip(asked, answers, strict=True)):
        assert len(texts) == len(said)
        for text, tokens in zip(texts, said, strict=True):
            inputs = processor(
                text=FIRST_TURN.format(question=text), videos=clips.frames[index], return_tensors="pt"
            )
            whole = target.generate(**inputs, max_new_tokens=24, do_sample=False)
            assert tokens == whole[0, inputs["input_ids"].shape[1] :].tolist()
            ended += tokens[-1] == tokenizer.eos_token_id
    assert 0 < ended < 12
    assert len({tuple(tokens) for said in answers for tokens in said}) > 6


def collect(target, tokenizer, clips: Clips, path: Path, positions=range(5), done=lambda n: None):
    return collect_outputs(target, tokenizer, clips, positions, path, done)


@pytest.mark.usefixtures("short")
def test_an_interrupted_file_goes_on_where_it_stopped(
    target, tokenizer, clips: Clips, tmp_path: Path
) -> None:
    whole = collect(target, tokenizer, clips, tmp_path / "whole.jsonl")
    asked = zip(clips.indices.tolist(), clips.questions, strict=True)
    assert [o[:3] for o in whole] == [(clip, q.kind, q.text) for clip, questions in asked for q in questions]
    assert all(len(output.tokens) == 6 or output.tokens[-1] == tokenizer.eos_token_id for output in whole)

    def stop(through: int) -> None:
        if through == GROUP:
            raise KeyboardInterrupt

    path = tmp_path / "part.jsonl"
    with pytest.raises(KeyboardInterrupt):
        collect(target, tokenizer, clips, path, done=stop)
    with path.open("a") as file:
        file.write('[9,[["describe","What')
    told: list[int] = []
    assert collect(target, tokenizer, clips, path, done=told.append) == whole
    assert told == [GROUP, 5]
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.usefixtures("short")
def test_part_of_a_file_in_another_order(target, tokenizer, clips: Clips, tmp_path: Path) -> None:
    first = collect(target, tokenizer, clips, tmp_path / "a.jsonl", [0, 2])
    again = collect(target, tokenizer, clips, tmp_path / "a.jsonl", [2])
    assert again == first[len(clips.questions[0]) :]
    assert {output.clip for output in again} == {int(clips.indices[2])}


@pytest.mark.usefixtures("short")
def test_answers_of_other_weights_are_refused(target, tokenizer, clips: Clips, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    collect(target, tokenizer, clips, path, [0])
    other = build_model(preset("micro"), tokenizer, 1).eval()
    with pytest.raises(ValueError, match="holds answers with weights="):
        collect(other, tokenizer, clips, path, [0])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "is no file of answers or is broken"),
        ("not JSON\n", "is no file of answers or is broken"),
        ('{"specfuse": "outputs", "version": 99}\n', "that this version reads"),
        (
            json.dumps({"specfuse": "outputs", "version": 1, "weights": "0", "longest": 6}) + "\n",
            "weights='0'",
        ),
    ],
    ids=["empty", "text", "version", "weights"],
)
def test_other_files_are_refused(
    target, tokenizer, clips: Clips, tmp_path: Path, content: str, text: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=text):
        collect(target, tokenizer, clips, path, [0])
    assert path.read_text() == content
