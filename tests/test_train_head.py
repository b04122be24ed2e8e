"""``specfuse train head``: it learns what the drafter computes, resumes, and reports what it measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_eventgpt import a_processor, tiny_model
from tiny_models import randomize

from specfuse.cli.main import run
from specfuse.drafters import DraftHead, DraftState, HeadConfig, HeadDrafter
from specfuse.drafters.head_context import HeadContext
from specfuse.generate import SpeculativeGenerator
from specfuse.models.checkpoint import load_video_llava
from specfuse.train import loop
from specfuse.train.batches import pixels, prompt_end, prompt_start
from specfuse.train.build import build_model, build_processor
from specfuse.train.clip_store import load_clips
from specfuse.train.event_features import event_encoder
from specfuse.train.head import PLANS, HeadSettings, train_head
from specfuse.train.head_batches import HeadRows, Teacher
from specfuse.train.head_loss import asked, count_hits, head_loss, unrolled
from specfuse.train.outputs import answer_fully, collect_outputs
from specfuse.train.presets import preset
from specfuse.train.tokenizer import train_tokenizer

STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    with pytest.MonkeyPatch.context() as patch:
        for module in ("outputs", "head_report"):
            patch.setattr(f"specfuse.train.{module}.LONGEST", 16)
        patch.setattr("specfuse.train.head_report.CALLS", 5)
        yield


@pytest.fixture(scope="module")
def cache(world_cache: Path) -> Path:
    return world_cache


@pytest.fixture(scope="module")
def target(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a target with random weights."""
    clips = load_clips([1, 4], cache)
    tokenizer = train_tokenizer((q for asked in clips.questions for q in asked), 400)
    model = randomize(build_model(preset("micro"), tokenizer, 0), seed=2)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 2
    directory = tmp_path_factory.mktemp("target")
    model.save_pretrained(directory)
    build_processor(tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def settings(cache: Path, target: Path, tmp_path_factory: pytest.TempPathFactory) -> HeadSettings:
    directory = tmp_path_factory.mktemp("head") / "micro"
    return HeadSettings(
        directory=directory, target=target, plan=PLANS["micro"], cache=cache, steps=STEPS, seed=3
    )


@pytest.fixture(scope="module")
def figures(settings: HeadSettings) -> dict:
    return train_head(settings, SpeculativeGenerator)


@pytest.fixture(scope="module")
def teacher(target: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    model, processor = load_video_llava(target, dtype=torch.float32)
    clips = load_clips([1, 4], cache)
    path = tmp_path_factory.mktemp("said") / "outputs.jsonl"
    outputs = collect_outputs(model, processor.tokenizer, clips, [0, 1], path)
    return Teacher(model.requires_grad_(False), processor.tokenizer, clips, outputs, random_events)


def random_events(clips: Sequence[int]) -> torch.Tensor:
    return torch.stack([torch.randn(5, 24, generator=torch.Generator().manual_seed(c)) for c in clips])


def head_for(teacher: Teacher, event_width: int = 0) -> DraftHead:
    config = teacher.model.config.get_text_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        said = teacher.about(1).tokens.unique()
        sizes = HeadConfig(
            config.hidden_size,
            config.vocab_size,
            2,
            32,
            event_width=event_width,
            shortlist=len(said),
        )
        head = DraftHead(sizes)
        head.shortlist = said
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return head


def test_states_are_the_target_s_own(teacher: Teacher, target: Path, cache: Path) -> None:
    model, processor = load_video_llava(target, dtype=torch.float32)
    rows = teacher.about(4)
    clips = load_clips([4], cache)
    start = prompt_start(processor.tokenizer)
    questions = [q.text for q in clips.questions[0]]
    answers = answer_fully(model, processor.tokenizer, pixels(clips.frames), [questions], 16)[0]
    longer = [(q, a) for q, a in zip(questions, answers, strict=True) if len(a) > 1]
    assert len(longer) == len(rows.tokens) and len(set(map(len, answers))) > 1
    for row, (question, answer) in enumerate(longer):
        end = prompt_end(processor.tokenizer, question)
        assert int(rows.first[row]) == len(end)
        text = rows.tokens[row, : rows.lengths[row]].tolist()
        assert text == end + answer
        with torch.no_grad():
            states = model(
                input_ids=torch.tensor([start + text[:-1]]),
                pixel_values_videos=pixels(clips.frames),
                output_hidden_states=True,
            ).hidden_states[-1][0, len(start) :]
        kept = rows.states[row, : len(text) - 1]
        torch.testing.assert_close(kept, states, atol=1e-2, rtol=1e-2)  # kept in half precision
        assert torch.equal(rows.events[row], random_events([4])[0])


@pytest.mark.parametrize("event_width", [0, 24])
def test_it_is_unrolled_as_the_drafter_drafts(teacher: Teacher, event_width: int) -> None:
    head = head_for(teacher, event_width)
    rows = teacher.about(1)
    levels = list(unrolled(head, teacher.model, rows, 3))
    drafter = HeadDrafter(head, teacher.model)
    compared = 0
    for row in range(0, len(rows.tokens), 4):
        first, length = int(rows.first[row]), int(rows.lengths[row])
        tokens = rows.tokens[row, :length].tolist()
        for known in range(1, length - first - 1, 3):
            state = DraftState(
                [tokens[:first]],
                [tokens[first : first + known]],
                [True],
                [99],
                draft_inputs={"event_features": rows.events[row : row + 1]} if event_width else None,
                prompt_hidden=rows.states[row : row + 1, : first - 1],
                hidden=[(rows.states[row : row + 1, first - 1 : first - 1 + known], [known])],
            )
            context = HeadContext(drafter.head, drafter.token_inputs, state)
            with torch.no_grad():
                g = context.catch_up(state)
                for depth, level in enumerate(levels):
                    place = first - 2 + known + depth
                    if not bool(asked(rows, depth)[row, place]):
                        break
                    torch.testing.assert_close(g[0, 0], level[row, place], atol=1e-4, rtol=1e-4)
                    compared += 1
                    following = torch.tensor([[tokens[first + known + depth]]])
                    g = context.run_level(following, g, depth + 1)
    assert compared > 20


def test_padding_costs_nothing(teacher: Teacher) -> None:
    head, rows = head_for(teacher, 24), teacher.about(1)
    padded = HeadRows(
        torch.nn.functional.pad(rows.tokens, (0, 3), value=7),
        torch.nn.functional.pad(rows.states, (0, 0, 0, 3), value=2.5),
        *rows[2:],
    )
    torch.testing.assert_close(
        head_loss(head, teacher.model, rows, 3), head_loss(head, teacher.model, padded, 3)
    )
    for one, other in zip(
        count_hits(head, teacher.model, rows, 3), count_hits(head, teacher.model, padded, 3), strict=True
    ):
        assert torch.equal(one, other)


def test_hits_are_counted_along_chains(teacher: Teacher) -> None:
    """Counted again with plain loops, for a head that has learned a little."""
    head, rows = head_for(teacher), teacher.about(1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        head_loss(head, teacher.model, rows, 2).backward()
        optimizer.step()
    listed = head.shortlist
    levels = [
        listed[teacher.model.lm_head(g)[..., listed].argmax(-1)]
        for g in unrolled(head, teacher.model, rows, 3)
    ]
    hits, trials = [0, 0, 0], [0, 0, 0]
    for row in range(len(rows.tokens)):
        first, length = int(rows.first[row]), int(rows.lengths[row])
        for start in range(first - 1, length - 2):
            for depth, guesses in enumerate(levels):
                if start + depth + 2 >= length:
                    break
                trials[depth] += 1
                if guesses[row, start + depth] != rows.tokens[row, start + depth + 2]:
                    break
                hits[depth] += 1
    counted = count_hits(head, teacher.model, rows, 3)
    assert [x.tolist() for x in counted] == [hits, trials]
    assert 0 < hits[1] < trials[1] < trials[0]


def test_it_learns(teacher: Teacher) -> None:
    head, rows = head_for(teacher), teacher.about(1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = head_loss(head, teacher.model, rows, 3)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    hits, trials = count_hits(head, teacher.model, rows, 3)
    before = count_hits(head_for(teacher), teacher.model, rows, 1)
    assert hits[0] / trials[0] > 2 * before[0][0] / before[1][0]


def test_what_is_written_drafts(settings: HeadSettings, figures: dict, target: Path) -> None:
    model, _ = load_video_llava(target, dtype=torch.float32)
    head = HeadDrafter.from_pretrained(settings.directory, model).head
    wanted = torch.load(settings.directory / loop.STATE, weights_only=True)["head"]
    for name, value in head.state_dict().items():
        kept = wanted[name]
        assert torch.equal(value, kept.half().float() if kept.is_floating_point() else kept), name
    assert figures == json.loads((settings.directory / "figures.json").read_text())
    assert figures["identical"] == 1.0 and figures["calls"] == 5 and figures["clips"] == 2
    assert figures["steps"] == STEPS and figures["tokens_per_pass"] >= 1
    assert all(0 <= figures[f"acceptance_{depth}"] <= 1 for depth in range(1, 7))
    assert figures["parameters"] == sum(p.numel() for p in head.parameters())
    card = (settings.directory / "README.md").read_text()
    assert f"| 1 | {figures['acceptance_1']:.1%} |" in card
    assert f"**{figures['tokens_per_pass']:.2f} tokens per pass**" in card


def test_with_events(settings: HeadSettings, figures: dict, target: Path, tmp_path: Path) -> None:
    fused = replace(settings, directory=tmp_path / "out", events=random_events, event_width=24)
    assert train_head(fused, SpeculativeGenerator)["identical"] == 1.0
    model, _ = load_video_llava(target, dtype=torch.float32)
    assert HeadDrafter.from_pretrained(tmp_path / "out", model).head.config.event_width == 24
    assert "on the target's hidden states, fused with" in (tmp_path / "out" / "README.md").read_text()


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    settings: HeadSettings, figures: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
    part = replace(settings, directory=tmp_path / "part")

    def stop(stage: str, share: float, text: str) -> None:
        if stage == "head" and text.startswith("step 3,"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_head(part, SpeculativeGenerator, stop)
    train_head(replace(part, resume=True), SpeculativeGenerator)
    wanted = torch.load(settings.directory / loop.STATE, weights_only=True)["head"]
    found = torch.load(part.directory / loop.STATE, weights_only=True)["head"]
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    with pytest.raises(ValueError, match="belongs to a run with seed=3, not 4"):
        train_head(replace(part, resume=True, seed=4), SpeculativeGenerator)


@pytest.mark.parametrize("keep", [0, 5000])
def test_a_broken_state_is_named(settings: HeadSettings, figures: dict, tmp_path: Path, keep: int) -> None:
    (tmp_path / loop.STATE).write_bytes((settings.directory / loop.STATE).read_bytes()[:keep])
    with pytest.raises(ValueError, match="is no training state or is broken"):
        train_head(replace(settings, directory=tmp_path, resume=True), SpeculativeGenerator)


@pytest.fixture(scope="module")
def eventgpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an EventGPT with random weights and its processor."""
    directory = tmp_path_factory.mktemp("eventgpt")
    tiny_model().save_pretrained(directory)
    a_processor().save_pretrained(directory)
    return directory


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the event simulator, which takes a second for a clip."""

    def draw(clips: Sequence[int], cache: Path) -> np.ndarray:
        return np.stack([np.random.default_rng(c).integers(0, 255, (3, 64, 64, 3), np.uint8) for c in clips])

    monkeypatch.setattr("specfuse.train.event_features.load_event_pictures", draw)


@pytest.mark.usefixtures("pictures")
def test_event_features_are_the_encoder_s(eventgpt: Path, tmp_path: Path) -> None:
    encoder = event_encoder(eventgpt, tmp_path)
    found = encoder.features([3, 8])
    images = np.random.default_rng(8).integers(0, 255, (3, 64, 64, 3), np.uint8)
    inputs = a_processor()(event_images=list(images))
    with torch.no_grad():
        wanted = tiny_model().get_event_features(inputs["pixel_values_events"])
    torch.testing.assert_close(found[1], wanted[0])
    assert found.shape[2] == encoder.width and not torch.allclose(found[0], found[1])


@pytest.mark.usefixtures("pictures")
def test_the_command_with_events(
    cache: Path, target: Path, eventgpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--preset", "micro", "--cache", str(cache), "--target", str(target), "--minutes", "0.005"]
    out = tmp_path / "out"
    assert run(["train", "head", *arguments, "--events", str(eventgpt), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] == 1.0
    assert json.loads((out / "config.json").read_text())["event_width"] > 0
    assert "--target TARGET --events EVENTGPT" in (out / "README.md").read_text()
    assert run(["train", "head", *arguments, "--events", str(target), "--out", str(tmp_path / "other")]) == 2
    assert "not an 'eventgpt' one" in capsys.readouterr().err


def test_the_command(cache: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--preset", "micro", "--out", str(out), "--cache", str(cache), "--device", "cpu"]
    assert run(["train", "head", *options]) == 2
    assert "--target must be the directory of the trained target" in capsys.readouterr().err
    options += ["--target", str(target), "--minutes", "0.005"]
    assert run(["train", "head", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "figures.json").read_text())
    assert (
        "specfuse train head --target TARGET --preset micro --minutes 0.005"
        in (out / "README.md").read_text()
    )
    assert run(["train", "head", *options]) == 2
    assert "is not empty" in capsys.readouterr().err
