"""Pairs behind both decoders: the same place of the target's text on both sides, and windows of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import randomize

from specfuse.cli.main import run
from specfuse.data.world import split
from specfuse.models.checkpoint import load_eventgpt, load_video_llava
from specfuse.train import adapter_decoder, adapter_source
from specfuse.train.adapter_decoder import decoder_pairs
from specfuse.train.adapter_source import open_pairs
from specfuse.train.batches import pixels, prompt_end
from specfuse.train.build import build_drafter, build_drafter_processor, build_model, build_processor
from specfuse.train.clip_store import load_clips
from specfuse.train.drafter import drafter_preset
from specfuse.train.event_store import load_event_pictures
from specfuse.train.outputs import collect_outputs, weights_digest
from specfuse.train.presets import preset
from specfuse.train.tokenizer import train_tokenizer

HORIZON, CONTEXT = 4, 3


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Few clips, short answers, events of few pictures a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specfuse.train.outputs.LONGEST", 14)
        patch.setattr(adapter_decoder, "HORIZON", HORIZON)
        patch.setattr(adapter_decoder, "CONTEXT", CONTEXT)
        patch.setattr(adapter_source, "MICRO_HELD_OUT", 1)
        patch.setitem(adapter_source.TRAIN_CLIPS, "micro", 3)
        yield


@pytest.fixture(scope="module")
def cache(world_cache: Path) -> Path:
    return world_cache


@pytest.fixture(scope="module")
def directories(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target and a drafter with random weights."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("target", "drafter")}
    clips = load_clips(adapter_decoder._clips(preset("micro"))[0], cache)
    tokenizer = train_tokenizer((q for asked in clips.questions for q in asked), 400)
    model = randomize(build_model(preset("micro"), tokenizer, 0), seed=2)
    model.save_pretrained(made["target"])
    build_processor(tokenizer).save_pretrained(made["target"])
    own = load_video_llava(made["target"])[1].tokenizer
    own.add_tokens(["<event>"], special_tokens=True)
    drafter = randomize(build_drafter(drafter_preset(preset("micro")), own, 0), seed=5)
    drafter.save_pretrained(made["drafter"])
    build_drafter_processor(drafter, own).save_pretrained(made["drafter"])
    return made


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> tuple[Any, Any]:
    single = {"dtype": torch.float32}
    return (
        load_video_llava(directories["target"], **single),
        load_eventgpt(directories["drafter"], **single),
    )


def texts(models: tuple[Any, Any], cache: Path) -> list[tuple[int, list[int], list[int]]]:
    """Clip, question and answer in the order of the pairs, by tokens."""
    (target, processor), _ = models
    clips = load_clips(adapter_decoder._clips(preset("micro"))[0], cache)
    path = cache / f"outputs-{weights_digest(target)}.jsonl"
    outputs = collect_outputs(target, processor.tokenizer, clips, range(len(clips.indices)), path)
    tokenizer = processor.tokenizer
    return [(o.clip, prompt_end(tokenizer, o.question), o.tokens) for o in outputs if len(o.tokens) > 1]


def test_states_stand_where_the_same_token_is_about_to_be_said(models, cache: Path) -> None:
    pairs = decoder_pairs("states", *models, preset("micro"), cache)
    said = texts(models, cache)
    # The positions of a clip are counted through all its answers; of a held-out one none is left out.
    wanted, clips, answers = [], [], []
    for clip in dict.fromkeys(clip for clip, _, _ in said):
        step = 1 if clip in split("held_out") else 4
        every = [
            (token, row) for row, (number, _, text) in enumerate(said) if number == clip for token in text
        ]
        wanted += [token for token, _ in every[::step]]
        answers += [row for _, row in every[::step]]
        clips += [clip] * len(every[::step])
    assert pairs.clips.tolist() == clips and pairs.held_out.any() and not pairs.held_out.all()
    assert pairs.answers is not None and pairs.answers.tolist() == answers
    assert pairs.source_head is not None and pairs.target_head is not None
    # Greedy answers: the target's states name the tokens themselves, up to ties in half precision.
    named = (pairs.target.float() @ pairs.target_head.float().T).argmax(-1)
    assert (named == torch.tensor(wanted)).float().mean() > 0.97

    clip, asked, answer = said[0]
    drafter, processor = models[1]
    start = processor.tokenizer(
        processor.conversation.partition("<event>")[0], add_special_tokens=True
    ).input_ids
    events = [drafter.config.event_token_index] * drafter.config.event_tokens
    pictures = pixels(load_event_pictures([clip], cache))
    ids = torch.tensor([start + events + asked + answer[:-1]])
    with torch.no_grad():
        hidden = drafter.model(input_ids=ids, pixel_values_events=pictures).last_hidden_state[0]
    expected = hidden[-len(answer) :][::4]
    torch.testing.assert_close(pairs.source[: len(expected)].float(), expected, atol=1e-2, rtol=1e-2)


def test_drafts_are_windows_of_the_text_and_the_features_of_the_prompt(models, cache: Path) -> None:
    pairs = decoder_pairs("drafts", *models, preset("micro"), cache)
    assert pairs.rows is not None and pairs.context is not None
    said = texts(models, cache)
    windows = set()
    for clip, asked, answer in said:
        text = asked[:1] * CONTEXT + asked + answer
        step = 1 if clip in split("held_out") else 4
        for place in range(len(asked), len(asked + answer) - HORIZON + 1, step):
            windows.add((clip, *text[place : place + CONTEXT + HORIZON]))
    found = torch.cat([pairs.clips[:, None], pairs.context, pairs.target], 1).tolist()
    assert set(map(tuple, found)) == windows and len(windows) > 20
    clip = int(pairs.clips[-1])
    with torch.no_grad():
        expected = models[1][0].get_event_features(pixels(load_event_pictures([clip], cache)))
    torch.testing.assert_close(pairs.sources(torch.tensor([-1])), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["token-alignment", "compression", "lightweight", "expander"])
def test_kinds_learn_from_two_models(kind: str, directories, cache: Path, tmp_path: Path, capsys) -> None:
    command = ["train", "adapter", "--kind", kind, "--preset", "micro", "--minutes", "0.005", "--json"]
    for name, path in {**directories, "cache": cache, "out": tmp_path / "out"}.items():
        command += [f"--{name}", str(path)]
    assert run(command) == 0
    assert f'"kind": "{kind}"' in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_unknown_features_are_named(directories, cache: Path) -> None:
    where = (None, directories["target"], directories["drafter"])
    with pytest.raises(ValueError, match=r"one of pooled, .* drafts, got 'nonsense'"):
        open_pairs(*where, "nonsense", preset("micro"), cache, "cpu", lambda stage, share, text: None)
    with pytest.raises(ValueError, match="'video_llava' model, not an 'eventgpt' one"):
        wrong = (None, directories["target"], directories["target"])
        open_pairs(*wrong, "pooled", preset("micro"), cache, "cpu", lambda stage, share, text: None)
