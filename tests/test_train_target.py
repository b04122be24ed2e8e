"""``specfuse train target`` from end to end on the micro preset, and what resuming must not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import specfuse
from specfuse.cli.main import run
from specfuse.data.world import clip
from specfuse.models.checkpoint import load_video_llava
from specfuse.session import FIRST_TURN
from specfuse.train import loop
from specfuse.train.batches import pixels, prompt_start, rows
from specfuse.train.build import VIDEO_TOKENS
from specfuse.train.clip_store import load_clips
from specfuse.train.evaluate import answer_greedily
from specfuse.train.language import Features, answer_loss, read_start
from specfuse.train.presets import preset
from specfuse.train.target import STATE, Settings, train_target
from specfuse.train.vision import read_layer

STEPS = (3, 4)


@pytest.fixture(scope="module")
def cache(world_cache: Path) -> Path:
    return world_cache


@pytest.fixture(scope="module")
def settings(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    directory = tmp_path_factory.mktemp("target") / "micro"
    return Settings(directory=directory, preset=preset("micro"), cache=cache, steps=STEPS, seed=3)


@pytest.fixture(scope="module")
def trained(settings: Settings) -> Path:
    train_target(settings)
    return settings.directory


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / STATE, weights_only=True)["model"]


def test_what_is_written_loads_and_speculates(trained: Path) -> None:
    model, processor = load_video_llava(trained, dtype=torch.float32)
    prompt = FIRST_TURN.format(question="What is the weather like?")
    inputs = processor(text=prompt, videos=clip(1).frames, return_tensors="pt")
    options = {"max_new_tokens": 20, "do_sample": False}
    plain = model.generate(**inputs, **options)
    fast = specfuse.generate(model, specfuse.CorpusDrafter(), **inputs, **options)
    assert plain.shape[1] > inputs["input_ids"].shape[1]
    assert torch.equal(plain, fast)


def test_weights_are_those_of_training_in_half_precision(trained: Path) -> None:
    model, _ = load_video_llava(trained, dtype=torch.float32)
    wanted = weights_of(trained)
    for name, value in model.state_dict().items():
        source = name.replace("image_tower", "video_tower")
        assert torch.equal(value, wanted[source].half().float()), name


def test_card_and_figures(trained: Path) -> None:
    card = (trained / "README.md").read_text()
    figures = json.loads((trained / "accuracy.json").read_text())
    assert "specfuse train target --preset micro --seed 3" in card
    assert f"| **all** | {figures['questions']} | **{figures['overall']:.1%}** |" in card
    assert figures["clips"] == preset("micro").held_out_clips
    assert "3 steps on frames" in card and "4 steps on" in card


def test_curves(trained: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    with Image.open(trained / "loss.png") as picture:
        assert picture.size > (400, 200)


def stopped_at(stage: str, step: int) -> Callable[[str, float, str], None]:
    def report(name: str, share: float, text: str) -> None:
        if name == stage and text.startswith(f"step {step},"):
            raise KeyboardInterrupt

    return report


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what is measured and written after training: only weights are looked at."""
    for name in ("examine", "write_reports"):
        monkeypatch.setattr(f"specfuse.train.target.{name}", lambda *arguments, **named: None)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("stage", "step"), [("vision", 2), ("language", 1), ("language", 3)])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    settings: Settings, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, step: int
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
    part = replace(settings, directory=tmp_path / "part")
    with pytest.raises(KeyboardInterrupt):
        train_target(part, stopped_at(stage, step))
    train_target(replace(part, resume=True))
    for name, value in weights_of(trained).items():
        assert torch.equal(value, weights_of(part.directory)[name]), name


@pytest.mark.usefixtures("unmeasured")
def test_another_seed_ends_elsewhere(settings: Settings, trained: Path, tmp_path: Path) -> None:
    other = replace(settings, directory=tmp_path / "other", seed=4)
    train_target(other)
    assert any(not torch.equal(v, weights_of(other.directory)[n]) for n, v in weights_of(trained).items())


def test_resuming_nothing(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no training to resume"):
        train_target(replace(settings, directory=tmp_path, resume=True))


def test_a_directory_with_files_is_left_alone(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        train_target(replace(settings, directory=tmp_path))


@pytest.mark.parametrize("keep", [0, 100, 20_000])
def test_a_broken_state_is_named(settings: Settings, trained: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / STATE).write_bytes((trained / STATE).read_bytes()[:keep])
    with pytest.raises(ValueError, match="is no training state or is broken"):
        train_target(replace(settings, directory=tmp_path, resume=True))


def test_a_state_of_another_run_is_refused(settings: Settings, trained: Path) -> None:
    with pytest.raises(ValueError, match="belongs to a run with seed=3, not 5"):
        train_target(replace(settings, directory=trained, resume=True, seed=5))


def test_broken_weights_are_named(trained: Path, tmp_path: Path) -> None:
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:9000])
    with pytest.raises(ValueError, match="weights can not be loaded"):
        load_video_llava(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="weights can not be loaded"):
        load_video_llava(tmp_path)


def test_the_loss_with_a_shared_prefix_is_that_of_whole_prompts(trained: Path, cache: Path) -> None:
    model, processor = load_video_llava(trained, dtype=torch.float32)
    tokenizer = processor.tokenizer
    clips = load_clips([1, 4], cache)
    asked = [question for questions in clips.questions for question in questions[3:6]]
    text = rows(tokenizer, asked)
    start = prompt_start(tokenizer)
    shared, middle = answer_loss(model, start, Features(model.model.video_tower, clips).live([0, 1]), text)
    ids = torch.cat([torch.tensor(start).expand(6, -1), text.ids], 1)
    videos = pixels(clips.frames).repeat_interleave(3, 0)
    whole = model(input_ids=ids, pixel_values_videos=videos, output_hidden_states=True)
    logits = whole.logits[:, len(start) :]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), text.targets, reduction="none")
    torch.testing.assert_close(shared, (each * text.weights).sum() / text.weights.sum(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(middle, whole.hidden_states[1][::3, len(start) - 1], atol=1e-4, rtol=1e-4)


def test_tokens_left_out_keep_their_places(trained: Path, cache: Path) -> None:
    model, processor = load_video_llava(trained, dtype=torch.float32)
    start = prompt_start(processor.tokenizer)
    features = torch.randn(2, VIDEO_TOKENS, model.config.vision_config.hidden_size)
    every = read_start(model, start, features)[0].layers[0]
    kept = torch.tensor([0, 3, 65, 519])
    some = read_start(model, start, features, kept)[0].layers[0]
    video = start.index(model.config.video_token_index)
    # The first layer's keys depend on token and place alone.
    assert torch.allclose(some.keys[:, :, video:], every.keys[:, :, video + kept], atol=1e-5)
    assert torch.equal(some.keys[:, :, :video], every.keys[:, :, :video])


def test_frozen_features_are_those_of_the_layer_that_the_model_reads(trained: Path, cache: Path) -> None:
    model, _ = load_video_llava(trained, dtype=torch.float32)
    frames = pixels(load_clips([1], cache).frames)[0]
    with torch.no_grad():
        states = model.model.video_tower(frames, output_hidden_states=True).hidden_states
        torch.testing.assert_close(read_layer(model.model.video_tower, frames), states[-2])
    assert model.config.vision_feature_layer == -2
    assert not torch.allclose(states[-1], states[-2])


def test_quick_answers_are_those_of_generate(trained: Path, cache: Path) -> None:
    model, processor = load_video_llava(trained, dtype=torch.float32)
    clips = load_clips([4], cache)
    questions = [question.text for question in clips.questions[0][:5]]
    features = Features(model.model.video_tower, clips).live([0])
    answers = answer_greedily(model, processor.tokenizer, features, questions, 12)
    for question, answer in zip(questions, answers, strict=True):
        prompt = FIRST_TURN.format(question=question)
        inputs = processor(text=prompt, videos=clips.frames[0], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.usefixtures("unmeasured")
def test_both_stages_learn(settings: Settings, tmp_path: Path) -> None:
    longer = replace(settings, directory=tmp_path, steps=(60, 25))
    train_target(longer)
    progress = torch.load(tmp_path / STATE, weights_only=True)["progress"]
    for stage in ("vision", "language"):
        losses = progress[stage]["losses"]
        assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]), stage


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([{"params": [weight], "rate": 0.1}])
    with pytest.raises(FloatingPointError, match="at step 0"):
        loop.run_stage(
            optimizer,
            lambda step, share: weight.sum() * float("nan"),
            loop.Budget(1.0, 2),
            loop.Progress(),
            lambda: None,
            lambda progress, share: None,
        )


def test_the_rate_rises_then_falls_to_the_end_of_the_budget() -> None:
    assert loop.rate_at(0, 0.0) < loop.rate_at(loop.WARM_UP, 0.0) == 1.0
    assert loop.rate_at(1000, 0.5) == pytest.approx((1 + loop.LAST_RATE) / 2)
    assert loop.rate_at(1000, 1.0) == pytest.approx(loop.LAST_RATE)
    assert loop.Budget(10.0).share(99, 5.0) == 0.5
    assert loop.Budget(10.0, steps=4).share(1, 99.0) == 0.25


def test_the_command(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--preset", "micro", "--out", str(out), "--cache", str(cache), "--device", "cpu"]
    assert run(["train", "target", *options, "--minutes", "0.01", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "accuracy.json").read_text())
    assert run(["train", "target", *options]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "whale"], "MODEL must be one of target"),
        (["train", "target", "--preset", "huge"], "preset must be one of tiny, micro, got 'huge'"),
        (["train", "target", "--minutes", "0"], "minutes must be above 0"),
        (["train", "target", "--resume"], "no training to resume"),
        (
            ["train", "target", "--target", "T"],
            "--target is for train drafter, distill, head, adapter, corpus",
        ),
        (["train", "target", "--drafter", "D"], "train target does not take it"),
        (["train", "head", "--kind", "linear"], "--kind is for train adapter; train head does not take it"),
        (["train", "corpus", "--minutes", "1"], "train corpus does not take it"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
