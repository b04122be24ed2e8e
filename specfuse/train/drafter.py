"""Trains a small EventGPT on the driving world's events and short answers: ``specfuse train drafter``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from specfuse.models.checkpoint import load_tokenizer
from specfuse.models.eventgpt_processor import EVENT_TOKEN
from specfuse.train.batches import pixels, prompt_start
from specfuse.train.build import build_drafter, build_drafter_processor
from specfuse.train.card import DRAFTER
from specfuse.train.clip_store import Clips
from specfuse.train.evaluate import Accuracy, Ask, answer_behind, examine
from specfuse.train.event_store import NUM_IMAGES, load_event_pictures
from specfuse.train.language import Features, LanguageBatches, repeat_cache, run_start, text_loss
from specfuse.train.loop import Budget, Report, check_run
from specfuse.train.presets import Preset
from specfuse.train.tokenizer import train_tokenizer
from specfuse.train.training import Settings, Training, budgets, world_clips, write_reports
from specfuse.train.vision import read_last_layer, vision_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
    from transformers.cache_utils import Cache

    from specfuse.models.eventgpt import EventGptForConditionalGeneration

# Of the eight frames, those in the middle of a fifth of the clip: their patches say what a picture shows.
FRAMES_OF_PICTURES = (1, 2, 4, 5, 6)


def drafter_preset(preset: Preset) -> Preset:
    """A target's preset for its drafter: half as many decoder layers, larger batches, less time."""
    return replace(
        preset,
        vision_layers=max(preset.vision_layers - 1, 2),
        text_layers=max(preset.text_layers // 2, 1),
        vision_share=0.35,
        facts_share=0.3,
        frozen_share=0.7,
        fact_clips=2 * preset.fact_clips,
        text_clips=2 * preset.text_clips,
        minutes=min(preset.minutes, 15.0),
    )


class DrafterTraining(Training):
    """An EventGPT in training; ``clips`` hold pictures of events for frames."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerFast, clips: Clips):
        model = build_drafter(settings.preset, tokenizer, settings.seed).to(settings.device)
        inner = model.model
        parts = (inner.visual_projector, inner.feature_adaptor, inner.language_model, model.lm_head)
        super().__init__(settings, model, inner.visual_tower, parts, clips, tokenizer)

    def vision(self, budget: Budget, report: Report) -> None:
        """Stage 1."""
        preset, seed = self.settings.preset, self.settings.seed

        def loss_at(step: int, share: float) -> Tensor:
            return vision_loss(self.tower, self.heads, self.clips, preset, seed, step, read_last_layer)

        self.run("vision", loss_at, budget, report)

    def language(self, budget: Budget, report: Report) -> None:
        """Stage 2."""
        preset = self.settings.preset
        features = Features(self.tower, self.clips, read_last_layer)
        batches = LanguageBatches(self.tokenizer, self.clips, preset, self.settings.seed, short=True)
        start = event_start(self.model, self.tokenizer)

        def loss_at(step: int, share: float) -> Tensor:
            chosen, text = batches.at(step, facts_only=share < preset.facts_share or step % 2 == 1)
            seen = features.frozen(chosen) if share < preset.frozen_share else features.live(chosen)
            once, middle = read_events(self.model, start, seen)
            cache = repeat_cache(once, len(text.ids) // len(chosen))
            return text_loss(self.model, cache, len(start), text) + self.facts_known(middle, chosen)

        self.run("language", loss_at, budget, report)


def train_drafter(
    settings: Settings,
    target: str | os.PathLike[str] | None = None,
    report: Report = lambda stage, share, text: None,
) -> Accuracy:
    """Trains, writes the model directory and measures held-out accuracy.

    Args:
        settings: what to train, where and for how long; the preset is the drafter's.
        target: directory of the model to draft for, whose tokenizer is taken. Without one, it is trained as
            the target's is, from the same clips, and is the same.
        report: is told about progress.

    Returns:
        Accuracy on held-out clips; also in the directory's ``README.md`` and ``accuracy.json``.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: as ``specfuse.train.target.train_target``, and for a
            target without a tokenizer.
    """
    directory, preset = settings.directory, settings.preset
    check_run(directory, settings.minutes, settings.resume)
    tokenizer = None if target is None else load_tokenizer(target)
    train, held_out = (with_events(clips, settings.cache, report) for clips in world_clips(settings, report))
    if tokenizer is None:
        tokenizer = train_tokenizer((q for asked in train.questions for q in asked), preset.vocabulary)
    tokenizer.add_tokens([EVENT_TOKEN], special_tokens=True)
    training = DrafterTraining(settings, tokenizer, train)
    if settings.resume:
        training.load()
    directory.mkdir(parents=True, exist_ok=True)
    first, second = budgets(settings)
    if not training.progress["language"].step:
        training.vision(first, report)
    training.language(second, report)
    training.save_weights()
    build_drafter_processor(training.model, tokenizer).save_pretrained(directory)
    ask = ask_events(training.model, tokenizer, held_out)
    accuracy = examine(ask, held_out, lambda n: report("held out", n / len(held_out.indices), f"{n} clips"))
    about = DRAFTER | {"command": "specfuse train drafter --target TARGET"}
    write_reports(training, accuracy, held_out, ask, about, short=True)
    return accuracy


def with_events(clips: Clips, cache: Path, report: Report) -> Clips:
    """Clips with pictures of events ``[C, 5, 64, 64, 3]`` in place of their frames."""
    total = len(clips.indices)
    pictures = load_event_pictures(
        clips.indices, cache, lambda n: report("events", n / total, f"{n} of {total} drawn")
    )
    return clips._replace(frames=pictures, patches=clips.patches[:, list(FRAMES_OF_PICTURES)])


def event_start(model: EventGptForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens of a prompt up to the last ``<event>``."""
    return prompt_start(tokenizer, EVENT_TOKEN, model.config.event_tokens)


def read_events(
    model: EventGptForConditionalGeneration, start: list[int], seen: Tensor
) -> tuple[Cache, Tensor]:
    """Keys and values of the start of a prompt, and the middle layer at its end, for M clips.

    Args:
        model: the drafter.
        start: tokens as from ``event_start``.
        seen: ``[M, 5 * 65, D]`` of the tower, of M clips.
    """
    inner = model.model
    features = inner.pool(seen.unflatten(1, (NUM_IMAGES, -1)))
    ids = torch.tensor(start, device=seen.device).expand(len(seen), -1)
    embeddings = inner.splice(ids, inner.get_input_embeddings()(ids), features)
    return run_start(inner.language_model, embeddings, torch.arange(len(start), device=seen.device))


def ask_events(
    model: EventGptForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, clips: Clips
) -> Ask:
    """Asks an EventGPT, which is put into eval mode, about clips with pictures of events."""
    model.eval()
    features = Features(model.model.visual_tower, clips, read_last_layer)
    start = event_start(model, tokenizer)

    @torch.no_grad()
    def ask(clip: int, texts: list[str], most: int) -> list[str]:
        once, _ = read_events(model, start, features.live([clip]))
        return answer_behind(model, tokenizer, once, len(start), texts, most)

    return ask


def event_features(model: EventGptForConditionalGeneration, cache: Path) -> Callable[[Sequence[int]], Tensor]:
    """Clips of the world, by index, to what the drafter's prompt holds of their events ``[C, 70, D]``."""
    model.eval()

    @torch.no_grad()
    def features(indices: Sequence[int]) -> Tensor:
        pictures = load_event_pictures(np.asarray(indices), cache)
        return model.get_event_features(pixels(pictures).to(model.device))

    return features
