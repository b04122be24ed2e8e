"""Pairs behind both decoders, along what the target says: last hidden states, or tokens to come."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specfuse.data.world import split
from specfuse.drafters.vocabulary import check_same_tokens
from specfuse.train.adapter_pairs import Pairs
from specfuse.train.clip_store import load_clips
from specfuse.train.distill import PLANS, drafter_states, tower_states
from specfuse.train.drafter import event_start
from specfuse.train.head_batches import HeadRows, Teacher
from specfuse.train.outputs import collect_outputs, weights_digest
from specfuse.train.presets import Preset

FEATURES = ("states", "drafts")
HORIZON = 16  # tokens that a compression drafter predicts
CONTEXT = 8  # tokens of the text that it reads
EVERY = 4  # positions of an answer to learn from: neighbours say nearly the same
EVERY_CLIP = 6  # of the clips that heads and drafters learn from


def decoder_pairs(
    features: str,
    target: tuple[Any, Any],
    drafter: tuple[Any, Any],
    preset: Preset,
    cache: str | os.PathLike[str],
    report: Callable[[str, float, str], None] = lambda stage, share, text: None,
) -> Pairs:
    """Pairs at every fourth token, of held-out clips at every token, of the target's answers about clips.

    - "states": the last hidden states of both models where they are about to say that token, the drafter
      having read the target's text so far and events instead of frames; with both language-model heads.
    - "drafts": the event features that the drafter's prompt holds, the last 8 tokens of the text, and as
      target the 16 tokens that follow, where as many do; with the drafter's head.

    Args:
        features: one of ``FEATURES``.
        target, drafter: model and processor of both, in eval mode.
        preset: its name says how many clips.
        cache: of drawn clips and of the target's answers; answers that are not there are asked for.
        report: is told about progress.

    Raises:
        ValueError: other features, or two models that do not share their tokens.
    """
    if features not in FEATURES:
        raise ValueError(f"features must be one of {', '.join(FEATURES)}, got {features!r}")
    tokenizer = target[1].tokenizer
    check_same_tokens(tokenizer, drafter[1].tokenizer)
    chosen, held_out = _clips(preset)
    clips = load_clips(chosen, cache, lambda n: report("clips", n / len(chosen), f"{n} drawn"))
    outputs = collect_outputs(
        target[0],
        tokenizer,
        clips,
        range(len(chosen)),
        Path(cache) / f"outputs-{weights_digest(target[0])}.jsonl",
        lambda n: report("answers", n / len(chosen), f"about {n} of {len(chosen)} clips"),
    )
    teacher = Teacher(target[0], tokenizer, clips, outputs, tower_states(drafter[0], Path(cache)))
    collect = _Collected(features, drafter[0], event_start(drafter[0], drafter[1].tokenizer))
    measured = set(held_out.tolist())
    for index, clip in enumerate(teacher.clips):
        collect.add(clip, teacher.about(clip), 1 if clip in measured else EVERY)
        report("features", (index + 1) / len(teacher.clips), f"{index + 1} of {len(teacher.clips)} clips")
    models = f"drafter {weights_digest(drafter[0])}, target {weights_digest(target[0])}"
    about = f"{features} along the target's answers about {len(chosen)} clips, {models}"
    return collect.pairs(target[0].get_output_embeddings().weight, held_out, about)


def _clips(preset: Preset) -> tuple[np.ndarray, np.ndarray]:
    """Clips to learn from and to measure on, some of those whose answers ``train distill`` asks for."""
    plan = PLANS[preset.name]
    pool, held_out = split("train")[: plan.pool], split("held_out")
    train = pool[np.linspace(0, len(pool) - 1, plan.train_clips).astype(int)]
    held_out = held_out[np.linspace(0, len(held_out) - 1, plan.held_out_clips).astype(int)]
    return np.concatenate([train[::EVERY_CLIP], held_out]), held_out


class _Collected:
    """What was read so far, in half precision."""

    def __init__(self, features: str, drafter: Any, start: list[int]):
        self.features, self.drafter, self.start = features, drafter, start
        self.sources: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.contexts: list[Tensor] = []
        self.clips: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.answers: list[Tensor] = []
        self.answered = 0

    @torch.no_grad()
    def add(self, clip: int, rows: HeadRows, every: int) -> None:
        """Every answer about one clip, at one in ``every`` of its tokens."""
        before = sum(map(len, self.clips))
        if self.features == "states":
            states, said = drafter_states(self.drafter, self.start, rows, len(rows.tokens))
            self.sources.append(states[said][::every].half().cpu())
            self.targets.append(rows.states[said][::every].half().cpu())
            self.answers.append(self.answered + said.nonzero()[::every, 0].cpu())
        else:
            self._windows(rows, every)
        self.answered += len(rows.tokens)
        new = sum(map(len, self.targets)) - before
        self.clips.append(torch.full((new,), clip))

    def _windows(self, rows: HeadRows, every: int) -> None:
        """Text before and after tokens that have 16 to follow."""
        assert rows.events is not None
        seen = rows.events[:1].unflatten(1, (self.drafter.config.num_event_images, -1))
        self.sources.append(self.drafter.model.pool(seen).half().cpu())
        tokens = rows.tokens.cpu()
        spans = zip(tokens, rows.first.tolist(), rows.lengths.tolist(), strict=True)
        for answer, (text, first, length) in enumerate(spans):
            # A text shorter than the context begins with its first token again and again.
            padded = torch.cat([text[:1].expand(CONTEXT), text])
            places = torch.arange(first, length - HORIZON + 1, every)
            if not len(places):
                continue
            windows = padded[places[:, None] + torch.arange(CONTEXT + HORIZON)]
            self.contexts.append(windows[:, :CONTEXT])
            self.targets.append(windows[:, CONTEXT:])
            self.rows.append(torch.full((len(places),), len(self.sources) - 1))
            self.answers.append(torch.full((len(places),), self.answered + answer))

    def pairs(self, head: Tensor, held_out: np.ndarray, about: str) -> Pairs:
        """All of it, with the heads."""
        clips = torch.cat(self.clips)
        head = head.detach().half().cpu()
        states = self.features == "states"
        # The drafter's tokens behind the target's, such as <event>, are never right.
        own = self.drafter.get_output_embeddings().weight.detach()[: len(head)].half().cpu()
        return Pairs(
            torch.cat(self.sources),
            torch.cat(self.targets),
            clips,
            torch.isin(clips, torch.from_numpy(held_out)),
            context=None if states else torch.cat(self.contexts),
            rows=None if states else torch.cat(self.rows),
            answers=torch.cat(self.answers),
            source_head=own,
            target_head=head if states else None,
            features=self.features,
            about=about,
        )
