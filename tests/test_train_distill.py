"""``specfuse train distill``: the drafter learns what the target says, and what that is worth is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import randomize
from torch.nn.functional import cosine_similarity

import specfuse
from specfuse.cli.main import run
from specfuse.models.checkpoint import load_eventgpt, load_video_llava
from specfuse.train import event_store, loop
from specfuse.train.acceptance import chain_figures
from specfuse.train.batches import generator, pixels, prompt_end, prompt_start
from specfuse.train.build import build_drafter, build_drafter_processor, build_model, build_processor
from specfuse.train.clip_store import Clips, load_clips
from specfuse.train.distill import (
    PLANS,
    STATE_WEIGHT,
    TOKEN_WEIGHT,
    DistillSettings,
    distill_loss,
    draft_hits,
    tower_states,
    train_distill,
)
from specfuse.train.drafter import drafter_preset, event_start
from specfuse.train.head_batches import Teacher
from specfuse.train.outputs import collect_outputs
from specfuse.train.presets import preset
from specfuse.train.tokenizer import train_tokenizer

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Short answers, few clips drawn beside those asked for, events of few pictures a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specfuse.train.outputs.LONGEST", 16)
        yield


@pytest.fixture(scope="module")
def cache(world_cache: Path) -> Path:
    return world_cache


@pytest.fixture(scope="module")
def clips(cache: Path) -> Clips:
    return load_clips([1, 4], cache)


@pytest.fixture(scope="module")
def target(clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a target with random weights."""
    tokenizer = train_tokenizer((q for asked in clips.questions for q in asked), 400)
    model = randomize(build_model(preset("micro"), tokenizer, 0), seed=2)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 2
    directory = tmp_path_factory.mktemp("target")
    model.save_pretrained(directory)
    build_processor(tokenizer).save_pretrained(directory)
    return directory


def write_drafter(directory: Path, tokenizer: Any) -> Path:
    tokenizer.add_tokens(["<event>"], special_tokens=True)
    model = build_drafter(drafter_preset(preset("micro")), tokenizer, 0)
    randomize(model, seed=5)
    model.save_pretrained(directory)
    build_drafter_processor(model, tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def drafter(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = load_video_llava(target)[1].tokenizer
    return write_drafter(tmp_path_factory.mktemp("drafter"), tokenizer)


@pytest.fixture(scope="module")
def settings(cache: Path, target: Path, drafter: Path, tmp_path_factory: Any) -> DistillSettings:
    directory = tmp_path_factory.mktemp("distilled") / "micro"
    return DistillSettings(
        directory=directory,
        target=target,
        drafter=drafter,
        plan=PLANS["micro"],
        cache=cache,
        steps=STEPS,
        seed=3,
    )


@pytest.fixture(scope="module")
def figures(settings: DistillSettings) -> dict[str, Any]:
    return train_distill(settings)


@pytest.fixture(scope="module")
def lesson(target: Path, drafter: Path, cache: Path, clips: Clips, tmp_path_factory: Any) -> Any:
    """Target, drafter, the target's answers about two clips, and a teacher that knows them."""
    model, processor = load_video_llava(target, dtype=torch.float32)
    model.requires_grad_(False)
    student, own = load_eventgpt(drafter, dtype=torch.float32)
    path = tmp_path_factory.mktemp("outputs") / "outputs.jsonl"
    outputs = collect_outputs(model, processor.tokenizer, clips, [0, 1], path)
    teacher = Teacher(model, processor.tokenizer, clips, outputs, tower_states(student, cache))
    return model, student, own, outputs, teacher


# ------------------------------------------------------------------------------------------- acceptance


def test_figures_of_a_chain_by_hand() -> None:
    found = chain_figures([[True, True, False, True], []], depth=2)
    assert found == {"acceptance_1": 0.75, "acceptance_2": 0.5, "tokens_per_pass": 2.0}
    assert chain_figures([], depth=1) == {"acceptance_1": 0.0, "tokens_per_pass": 0.0}
    assert chain_figures([[True] * 12], depth=5)["tokens_per_pass"] == 6.0
    assert chain_figures([[False] * 3], depth=5)["tokens_per_pass"] == 1.0


def test_hits_say_how_many_passes_the_loop_takes(
    lesson: Any, clips: Clips, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes that ``specfuse.generate`` takes with this drafter follow from them, without drafting."""
    model, student, own, outputs, teacher = lesson
    monkeypatch.setattr("specfuse.pacing.Backoff.learn", lambda *_, **__: None)  # drafts in every pass
    half = student.lm_head.weight.detach().clone()
    event = own.tokenizer.convert_tokens_to_ids("<event>")
    passes = tokens = 0
    clip = int(clips.indices[0])
    hits = []
    with torch.no_grad():
        # The target's favourite tokens are made the drafter's, or hardly a draft would be right.
        said = torch.tensor([t for output in outputs for t in output.tokens])
        student.lm_head.weight.zero_()
        bias = torch.bincount(said, minlength=event + 1).float()
    drafter = specfuse.EventDrafter(student, own, own.tokenizer, depth=3)
    handle = student.lm_head.register_forward_hook(lambda m, a, out: out + bias)
    try:
        hits = draft_hits(student, event_start(student, own.tokenizer), teacher, clip)
        seen = drafter.see(event_images=list(event_store.load_event_pictures([clip], cache)[0]))
        about = [output for output in outputs if output.clip == clip and len(output.tokens) > 1]
        for output, row in zip(about[:6], hits, strict=False):
            assert len(row) == len(output.tokens)
            prompt = prompt_start(own.tokenizer) + prompt_end(own.tokenizer, output.question)
            ids = torch.tensor([prompt])
            result = specfuse.generate(
                model,
                drafter,
                draft_inputs=seen,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values_videos=pixels(clips.frames[[0]]),
                max_new_tokens=16,
                do_sample=False,
                return_dict_in_generate=True,
            )
            assert result.sequences[0, len(prompt) :].tolist() == output.tokens
            passes, tokens = passes + result.stats.passes, tokens + len(row)
    finally:
        handle.remove()
        with torch.no_grad():
            student.lm_head.weight.copy_(half)
    assert round(tokens / passes, 3) == chain_figures(hits[: len(about[:6])], depth=3)["tokens_per_pass"]
    assert tokens > passes


# ----------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_plain_one(lesson: Any, cache: Path) -> None:
    model, student, own, _, teacher = lesson
    torch.manual_seed(0)
    to_target = torch.nn.Linear(32, 32)
    rows = teacher.at(0, 0, 2, 3)
    start = event_start(student, own.tokenizer)
    found = distill_loss(student, model, to_target, start, rows, 3)
    chosen = [teacher.clips[i] for i in generator(0, 4, 0).integers(2, size=2)]
    divergences, tokens, apart = [], [], []
    for row in range(6):
        count, first = int(rows.lengths[row]), int(rows.first[row])
        text = rows.tokens[row, :count].tolist()
        pictures = event_store.load_event_pictures([chosen[row // 3]], cache)
        ids = torch.tensor([start + text])
        out = student(input_ids=ids, pixel_values_events=pixels(pictures), output_hidden_states=True)
        for place in range(first - 1, count - 1):
            wanted = model.lm_head(rows.states[row, place]).softmax(-1)
            log = out.logits[0, len(start) + place].log_softmax(-1)[: len(wanted)]
            divergences.append((wanted * (wanted.log() - log)).sum())
            tokens.append(-log[text[place + 1]])
            state = out.hidden_states[-1][0, len(start) + place]
            apart.append(1 - cosine_similarity(to_target(state), rows.states[row, place], dim=0))
    means = [torch.stack(values).mean() for values in (divergences, tokens, apart)]
    wanted = means[0] + TOKEN_WEIGHT * means[1] + STATE_WEIGHT * means[2]
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_it_learns_what_the_target_says(lesson: Any) -> None:
    model, student, own, _, teacher = lesson
    start = event_start(student, own.tokenizer)
    student.model.visual_tower.requires_grad_(False)
    to_target = torch.nn.Linear(32, 32)
    learning = [p for p in [*student.parameters(), *to_target.parameters()] if p.requires_grad]
    saved = {name: value.clone() for name, value in student.state_dict().items()}
    before = chain_figures(draft_hits(student, start, teacher, teacher.clips[0]))
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    for step in range(25):
        optimizer.zero_grad()
        distill_loss(student, model, to_target, start, teacher.at(0, step, 2, 4), 4).backward()
        optimizer.step()
    after = chain_figures(draft_hits(student, start, teacher, teacher.clips[0]))
    student.load_state_dict(saved)
    assert after["acceptance_1"] > before["acceptance_1"] + 0.1


# ------------------------------------------------------------------------------------------- the command


def test_figures_and_card(settings: DistillSettings, figures: dict[str, Any]) -> None:
    directory = settings.directory
    assert json.loads((directory / "figures.json").read_text()) == figures
    assert figures["clips"] == 2 and figures["steps"] == STEPS
    card = (directory / "README.md").read_text()
    line = f"| 1 | {figures['acceptance_1_before']:.1%} | {figures['acceptance_1_after']:.1%} |"
    assert line in card and "specfuse train distill" in card
    before, _ = load_eventgpt(settings.drafter, dtype=torch.float32)
    after, processor = load_eventgpt(directory, dtype=torch.float32)
    assert processor.tokenizer.get_vocab()["<event>"] == after.config.event_token_index
    changed = {
        n for n, v in after.state_dict().items() if not torch.equal(v, before.state_dict()[n].half().float())
    }
    assert changed and not any("visual_tower" in name for name in changed)


@pytest.mark.usefixtures("figures")
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    settings: DistillSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(name: str, share: float, text: str) -> None:
        if text.startswith("step 2,"):
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
    part = replace(settings, directory=tmp_path / "part")
    with pytest.raises(KeyboardInterrupt):
        train_distill(part, stop)
    train_distill(replace(part, resume=True))
    states = [torch.load(d / loop.STATE)["drafter"] for d in (part.directory, settings.directory)]
    for name, value in states[1].items():
        assert torch.equal(states[0][name], value), name
    with pytest.raises(ValueError, match="belongs to a run with seed=3, not 4"):
        train_distill(replace(part, resume=True, seed=4))


def test_a_drafter_with_other_tokens_is_refused(
    settings: DistillSettings, cache: Path, tmp_path: Path
) -> None:
    other = train_tokenizer((q for asked in load_clips([9], cache).questions for q in asked), 400)
    foreign = write_drafter(tmp_path / "foreign", other)
    with pytest.raises(ValueError, match="tokens are others to the drafter"):
        train_distill(replace(settings, directory=tmp_path / "out", drafter=foreign))
    with pytest.raises(ValueError, match="holds a 'video_llava' model, not an 'eventgpt' one"):
        train_distill(replace(settings, directory=tmp_path / "out", drafter=settings.target))


def test_the_command(settings: DistillSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "train",
        "distill",
        "--preset",
        "micro",
        "--cache",
        str(settings.cache),
        "--target",
        str(settings.target),
    ]
    arguments += ["--out", str(tmp_path / "out")]
    assert run(arguments) == 2
    assert "--drafter must be the directory of a trained drafter" in capsys.readouterr().err
    assert run([*arguments, "--drafter", str(settings.drafter), "--minutes", "0.005", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "figures.json").read_text())


def test_rows_without_events_are_refused(lesson: Any, clips: Clips) -> None:
    model, student, own, outputs, _ = lesson
    blind = Teacher(model, own.tokenizer, clips, outputs)
    with pytest.raises(ValueError, match="must hold the tower's states for events"):
        distill_loss(student, model, torch.nn.Linear(32, 32), [1], blind.at(0, 0, 1, 2), 2)
