"""The shipped models: checked file by file, as good as their card says; and how they get into the package."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from specfuse.data import miniature
from specfuse.data.miniature import __main__ as command
from specfuse.data.world import clip, split
from specfuse.drafters import DraftState
from specfuse.models.checkpoint import load_video_llava
from specfuse.session import FIRST_TURN
from specfuse.train.build import build_model, build_processor
from specfuse.train.clip_store import Clips
from specfuse.train.corpus import CorpusSettings, train_corpus
from specfuse.train.evaluate import evaluate
from specfuse.train.outputs import weights_digest
from specfuse.train.presets import preset
from specfuse.train.tokenizer import train_tokenizer

TARGET = "tiny-video-llava"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as training leaves it: half-precision weights, processor, card, a state to resume from."""
    path = tmp_path_factory.mktemp("trained")
    tokenizer = train_tokenizer(clip(3).questions, 300)
    model = build_model(preset("micro"), tokenizer, seed=1)
    model.save_pretrained(path, state_dict={name: value.half() for name, value in model.state_dict().items()})
    build_processor(tokenizer).save_pretrained(path)
    (path / "README.md").write_text("card")
    (path / "training.pt").write_bytes(b"state")
    return path


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    path = tmp_path / "shipped"
    path.mkdir()
    miniature.ship({TARGET: trained}, path)
    return path


def test_what_is_shipped_is_what_was_trained(trained: Path, root: Path) -> None:
    assert miniature.shipped(root) == [TARGET]
    model, processor = miniature.load_target(root)
    assert not model.training and model.dtype == torch.float32
    expected, _ = load_video_llava(trained, dtype=torch.float32)
    assert weights_digest(model) == weights_digest(expected)
    assert processor.tokenizer("a car").input_ids
    assert not (root / TARGET / "training.pt").exists(), "what training resumes from stays behind"
    assert (root / TARGET / "README.md").read_text() == "card"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "README.md"])
def test_a_missing_truncated_or_changed_file_is_named(root: Path, file: str) -> None:
    path = root / TARGET / file
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{file} holds {len(content) - 1} bytes instead of {len(content)}"):
        miniature.load_target(root)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"{file} is not the file that was shipped"):
        miniature.load_target(root)
    path.unlink()
    with pytest.raises(FileNotFoundError) as missing:
        miniature.load_target(root)
    assert missing.value.filename == str(path)


def test_names_that_do_not_ship(root: Path) -> None:
    with pytest.raises(ValueError, match=r"name must be one of tiny-video-llava, .*, got 'llama'"):
        miniature.directory("llama", root)
    with pytest.raises(FileNotFoundError, match="does not come with the package yet"):
        miniature.load_corpus(root)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"tiny-head": {"a": {"bytes": "1"}}}', '{"tiny-head": 3}']
)
def test_a_broken_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / miniature.MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest of models or is broken"):
        miniature.directory("tiny-head", tmp_path)


def test_shipping_again_replaces_and_keeps_the_others(trained: Path, root: Path, tmp_path: Path) -> None:
    head = tmp_path / "head"
    head.mkdir()
    (head / "config.json").write_text("{}")
    miniature.ship({"tiny-head": head}, root)
    (head / "config.json").rename(head / "other.json")
    miniature.ship({"tiny-head": head}, root)
    assert miniature.shipped(root) == [TARGET, "tiny-head"]
    assert [path.name for path in miniature.directory("tiny-head", root).iterdir()] == ["other.json"]
    assert miniature.directory(TARGET, root).is_dir()


def test_what_does_not_ship(
    trained: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = miniature.read_manifest(root)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds nothing that ships"):
        miniature.ship({"tiny-head": empty}, root)
    with pytest.raises(FileNotFoundError):
        miniature.ship({"tiny-head": tmp_path / "nowhere"}, root)
    with pytest.raises(ValueError, match="got 'huge'"):
        miniature.ship({"huge": trained}, root)
    monkeypatch.setattr(miniature, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="1,000 may ship"):
        miniature.ship({"tiny-eventgpt": trained}, root)
    assert miniature.read_manifest(root) == before and miniature.directory(TARGET, root)


def test_the_command_that_ships(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([], tmp_path) == 0 and "no models" in capsys.readouterr().out
    assert command.main([f"{TARGET}={trained}"], tmp_path) == 0
    assert f"{tmp_path / TARGET}: " in capsys.readouterr().out
    assert command.main(["tiny-head"], tmp_path) == 2
    assert "NAME=DIRECTORY, got 'tiny-head'" in capsys.readouterr().err


# ---------------------------------------------------------------- remembered answers


@pytest.fixture(scope="module")
def remembered(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> CorpusSettings:
    settings = CorpusSettings(
        directory=tmp_path_factory.mktemp("corpus"),
        target=trained,
        preset=replace(preset("micro"), train_clips=2),
        cache=tmp_path_factory.mktemp("world"),
    )
    figures = train_corpus(settings)
    assert figures == json.loads((settings.directory / "corpus.json").read_text())
    return settings


def test_remembered_answers_are_drafted_for_the_same_question(
    trained: Path, remembered: CorpusSettings, tmp_path: Path
) -> None:
    miniature.ship({"tiny-corpus": remembered.directory}, tmp_path)
    drafter = miniature.load_corpus(tmp_path)
    model, processor = load_video_llava(trained, dtype=torch.float32)
    first = int(split("train")[0])
    question = clip(first).questions[-1].text
    inputs = processor(
        text=FIRST_TURN.format(question=question), videos=clip(first).frames, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=160, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    prompt = inputs["input_ids"][0].tolist()
    state = DraftState([prompt], [[]], [True], [160], frozenset({model.config.video_token_index}))
    tree = drafter.propose(state, 16)
    assert int(answer[0]) in tree.tokens[0, tree.parents[0] == 0].tolist()
    figures = json.loads((remembered.directory / "corpus.json").read_text())
    assert figures["weights"] == weights_digest(model)
    assert len(drafter) == figures["answers"] and drafter.num_tokens == figures["tokens"]
    assert sorted(path.name for path in (tmp_path / "tiny-corpus").iterdir()) == [
        "README.md",
        "answers.safetensors",
        "corpus.json",
    ]


def test_finished_clips_are_not_asked_about_again(
    remembered: CorpusSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (remembered.directory / "answers.safetensors").read_bytes()
    monkeypatch.setattr("specfuse.train.outputs.answer_fully", lambda *_: pytest.fail("asked again"))
    train_corpus(remembered)
    assert (remembered.directory / "answers.safetensors").read_bytes() == before


def test_the_card_of_a_model_is_not_overwritten(remembered: CorpusSettings, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a model's card")
    with pytest.raises(FileExistsError, match="is not empty"):
        train_corpus(replace(remembered, directory=tmp_path))
    assert (tmp_path / "README.md").read_text() == "a model's card"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


# ---------------------------------------------------------------- the real ones

needs_target = pytest.mark.skipif(
    TARGET not in miniature.shipped(), reason="the trained target does not come with this checkout yet"
)


def held_out(count: int) -> Clips:
    """Some of the clips that the card's figures were measured on."""
    every = split("held_out")
    measured = every[np.linspace(0, len(every) - 1, preset("tiny").held_out_clips).astype(int)]
    chosen = measured[np.linspace(0, len(measured) - 1, count).astype(int)]
    clips = [clip(int(index)) for index in chosen]
    frames = np.stack([c.frames for c in clips])
    nothing = np.zeros((count, 1))
    return Clips(chosen, frames, nothing, nothing, [c.questions for c in clips])


@needs_target
def test_the_shipped_target_is_as_right_as_its_card_says() -> None:
    model, processor = miniature.load_target()
    figures = json.loads((miniature.directory(TARGET) / "accuracy.json").read_text())
    accuracy = evaluate(model, processor.tokenizer, held_out(12))
    asked = sum(accuracy.asked.values())
    bound = 3.5 * math.sqrt(figures["overall"] * (1 - figures["overall"]) / asked)
    assert abs(accuracy.overall - figures["overall"]) < bound < 0.15, accuracy.as_dict()


@needs_target
def test_the_shipped_target_gives_the_answers_of_its_card() -> None:
    model, processor = miniature.load_target()
    card = (miniature.directory(TARGET) / "README.md").read_text()
    examples = re.findall(r"\*\*(.+)\*\*\n\nmodel: (.*)\n\ndata: ", card)
    assert len(examples) >= 3
    frames = clip(int(split("held_out")[0])).frames
    for question, answer in examples[:2]:
        inputs = processor(text=FIRST_TURN.format(question=question), videos=frames, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=160, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(new, skip_special_tokens=True).strip() == answer


@pytest.mark.skipif(
    "tiny-corpus" not in miniature.shipped(), reason="no remembered answers come with this checkout yet"
)
def test_the_shipped_answers_are_those_of_the_shipped_target() -> None:
    figures = json.loads((miniature.directory("tiny-corpus") / "corpus.json").read_text())
    assert figures["weights"] == weights_digest(miniature.load_target()[0])
    assert figures["bytes"] <= 1_000_000
    assert len(miniature.load_corpus()) == figures["answers"]


def test_everything_that_ships_is_unchanged_and_small() -> None:
    for name in miniature.shipped():
        assert miniature.directory(name).is_dir()
    files = [path for name in miniature.NAMES for path in (miniature.ROOT / name).glob("*")]
    assert sum(path.stat().st_size for path in files) <= miniature.MOST_BYTES
    listed = {name: sorted(files) for name, files in miniature.read_manifest().items()}
    found = {name: sorted(p.name for p in (miniature.ROOT / name).glob("*")) for name in listed}
    assert found == listed
