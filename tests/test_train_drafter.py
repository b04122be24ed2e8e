"""``specfuse train drafter`` from end to end on the micro preset."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import specfuse
from specfuse.cli.main import run
from specfuse.data.world import events
from specfuse.models.checkpoint import load_eventgpt, load_tokenizer
from specfuse.train import event_store, loop
from specfuse.train.batches import pixels, rows
from specfuse.train.build import build_model, build_processor
from specfuse.train.clip_store import load_clips
from specfuse.train.drafter import (
    ask_events,
    drafter_preset,
    event_features,
    event_start,
    read_events,
    train_drafter,
    with_events,
)
from specfuse.train.language import Features, repeat_cache, text_loss
from specfuse.train.presets import preset
from specfuse.train.tokenizer import train_tokenizer
from specfuse.train.training import Settings, world_clips
from specfuse.train.vision import read_last_layer

STEPS = (3, 4)


@pytest.fixture(scope="module")
def cache(world_cache: Path) -> Path:
    return world_cache


@pytest.fixture(scope="module")
def settings(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    directory = tmp_path_factory.mktemp("drafter") / "micro"
    return Settings(directory, drafter_preset(preset("micro")), cache, steps=STEPS, seed=3)


@pytest.fixture(scope="module")
def trained(settings: Settings) -> Path:
    train_drafter(settings)
    return settings.directory


def test_what_is_written_answers_about_a_stream(trained: Path) -> None:
    model, processor = load_eventgpt(trained, dtype=torch.float32)
    stream = events(1, 64, 16)
    inputs = processor(text=processor.prompt("What is the weather like?"), events=stream)
    options = {"max_new_tokens": 20, "do_sample": False}
    plain = model.generate(**inputs, **options)
    assert plain.shape[1] > inputs["input_ids"].shape[1]
    assert torch.equal(plain, specfuse.generate(model, specfuse.CorpusDrafter(), **inputs, **options))


def test_asking_in_batches_is_generate(trained: Path, cache: Path) -> None:
    model, processor = load_eventgpt(trained, dtype=torch.float32)
    clips = with_events(load_clips([1, 2], cache), cache, lambda *_: None)
    texts = ["What is the weather like?", "Is there a red car?"]
    answers = ask_events(model, processor.tokenizer, clips)(1, texts, 12)
    for text, answer in zip(texts, answers, strict=True):
        inputs = processor(text=processor.prompt(text), event_images=list(clips.frames[1]))
        torch.testing.assert_close(inputs["pixel_values_events"], pixels(clips.frames[[1]]))
        said = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = said[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(new, skip_special_tokens=True).strip() == answer


def test_the_loss_behind_a_shared_start_is_that_of_whole_prompts(trained: Path, cache: Path) -> None:
    model, processor = load_eventgpt(trained, dtype=torch.float32)
    tokenizer = processor.tokenizer
    clips = with_events(load_clips([1, 2], cache), cache, lambda *_: None)
    asked = [clips.questions[clip][question] for clip in (0, 1) for question in (0, 8)]
    text = rows(tokenizer, asked, short=True)
    start = event_start(model, tokenizer)
    seen = Features(model.model.visual_tower, clips, read_last_layer).live([0, 1])
    once, _ = read_events(model, start, seen)
    found = text_loss(model, repeat_cache(once, 2), len(start), text)
    total = weight = torch.zeros(())
    for row, question in enumerate(asked):
        inputs = processor(
            text=f"{processor.prompt(question.text)} {question.short}</s>",
            event_images=list(clips.frames[row // 2]),
        )
        logits = model(**inputs).logits[0, len(start) :]
        said = text.targets[row] != -100
        targets, weights = text.targets[row][said], text.weights[row][said]
        assert inputs["input_ids"][0, -len(targets) :].tolist() == targets.tolist()
        losses = torch.nn.functional.cross_entropy(logits[-len(targets) - 1 : -1], targets, reduction="none")
        total, weight = total + (losses * weights).sum(), weight + weights.sum()
    torch.testing.assert_close(found, total / weight, atol=1e-4, rtol=1e-4)


def test_features_for_others_are_the_models(trained: Path, cache: Path) -> None:
    model, processor = load_eventgpt(trained, dtype=torch.float32)
    found = event_features(model, cache)([2, 1])
    pictures = event_store.load_event_pictures([2, 1], cache)
    wanted = model.get_event_features(processor.pixels(event_images=[list(p) for p in pictures]))
    torch.testing.assert_close(found, wanted)


def test_the_tokenizer_is_the_targets(settings: Settings, trained: Path, tmp_path: Path) -> None:
    train, _ = world_clips(settings, lambda *_: None)
    tokenizer = train_tokenizer((q for asked in train.questions for q in asked), settings.preset.vocabulary)
    target = tmp_path / "target"
    build_model(preset("micro"), tokenizer, 0).save_pretrained(target)
    build_processor(tokenizer).save_pretrained(target)
    with_target = replace(settings, directory=tmp_path / "drafter", steps=(1, 1))
    train_drafter(with_target, target)
    vocabularies = [load_tokenizer(d).get_vocab() for d in (target, trained, with_target.directory)]
    assert vocabularies[1] == vocabularies[2] == vocabularies[0] | {"<event>": len(vocabularies[0])}
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        train_drafter(replace(with_target, directory=tmp_path / "other"), tmp_path / "nothing")


def test_card_and_figures(trained: Path) -> None:
    card = (trained / "README.md").read_text()
    figures = json.loads((trained / "accuracy.json").read_text())
    assert "specfuse train drafter --target TARGET --preset micro --seed 3" in card
    assert "# Tiny EventGPT" in card and "3 steps on pictures of events" in card
    assert f"| **all** | {figures['questions']} | **{figures['overall']:.1%}** |" in card


@pytest.mark.parametrize(("stage", "step"), [("vision", 2), ("language", 2)])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    settings: Settings, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, step: int
) -> None:
    def stop(name: str, share: float, text: str) -> None:
        if name == stage and text.startswith(f"step {step},"):
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
    part = replace(settings, directory=tmp_path / "part")
    with pytest.raises(KeyboardInterrupt):
        train_drafter(part, report=stop)
    train_drafter(replace(part, resume=True))
    found, wanted = (torch.load(d / loop.STATE)["model"] for d in (part.directory, trained))
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_the_command(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "drafter"
    arguments = ["train", "drafter", "--preset", "micro", "--out", str(out), "--cache", str(cache)]
    assert run([*arguments, "--minutes", "0.01", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "accuracy.json").read_text())
    assert run(arguments) == 2
    assert "is not empty" in capsys.readouterr().err


def test_the_drafter_is_smaller_and_shallower_than_the_target() -> None:
    target, drafter = preset("tiny"), drafter_preset(preset("tiny"))
    assert drafter.text_layers * 2 == target.text_layers
    assert drafter.minutes <= 15
