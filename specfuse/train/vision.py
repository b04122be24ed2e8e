"""Stage 1: the video tower learns to see, one frame at a time.

Linear heads on the layer that Video-LLaVA reads tell the clip's facts from the class token, of one frame and
of the mean of two, and from every patch what it shows and whose middle it holds. Attention over all frames
from scratch learns the same facts several times slower. The heads are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from specfuse.train.batches import generator, pixels
from specfuse.train.clip_store import Clips
from specfuse.train.labels import CENTRES, FACTS, SHOWN, UNKNOWN
from specfuse.train.presets import Preset

FRAMES = 2  # of each clip of a batch
PATCH_WEIGHT = 10.0
EMPTY_WEIGHT = 0.2  # most patches show nothing
BRIGHTNESS = 0.1
Read = Callable[[nn.Module, Tensor], Tensor]
"""A tower and pictures ``[M, 3, H, W]`` to the features ``[M, 65, D]`` that a model reads."""


def read_layer(tower: nn.Module, frames: Tensor) -> Tensor:
    """The layer before the last, as Video-LLaVA reads it: ``[M, 3, H, W]`` to ``[M, 65, D]``."""
    body: Any = getattr(tower, "vision_model", tower)
    states = body.pre_layrnorm(body.embeddings(frames))
    for layer in body.encoder.layers[:-1]:
        out = layer(states, attention_mask=None)
        states = out[0] if isinstance(out, tuple) else out
    return states


def read_last_layer(tower: nn.Module, pictures: Tensor) -> Tensor:
    """The last layer, as EventGPT reads it: ``[M, 3, H, W]`` to ``[M, 65, D]``."""
    states: Tensor = tower(pictures).last_hidden_state
    return states


class Heads(nn.Module):
    """Linear readings of a frame's features."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.facts = nn.ModuleList(nn.Linear(width, values) for values in FACTS.values())
        self.shown = nn.Linear(width, 1 + len(SHOWN))
        self.centre = nn.Linear(width, 1 + len(CENTRES))

    def read_facts(self, features: Tensor) -> list[Tensor]:
        """Logits of every fact ``[M, values]`` from the class tokens of ``features [M, F, 65, D]``."""
        token = self.norm(features[:, :, 0]).mean(1)
        return [head(token) for head in self.facts]

    def loss(self, features: Tensor, facts: Tensor, patches: Tensor) -> Tensor:
        """``features [M, F, 65, D]``, ``facts [M, len(FACTS)]``, ``patches [M, F, 64, 2]``."""
        frames = features.shape[1]
        each = features.flatten(0, 1)[:, None]
        total = facts_loss(self.read_facts(each), facts.repeat_interleave(frames, 0))
        total = 0.5 * (total + facts_loss(self.read_facts(features), facts))
        tokens = self.norm(features[:, :, 1:])
        for head, labels in ((self.shown, patches[..., 0]), (self.centre, patches[..., 1])):
            weight = torch.ones(head.out_features, device=tokens.device)
            weight[0] = EMPTY_WEIGHT
            total = total + PATCH_WEIGHT * cross_entropy(head(tokens).flatten(0, 2), labels.flatten(), weight)
        return total


def facts_loss(logits: list[Tensor], facts: Tensor) -> Tensor:
    """The summed loss of all facts, ``logits`` as from ``read_facts``, ``facts [M, len(FACTS)]``."""
    losses = [
        cross_entropy(values, facts[:, i], ignore_index=UNKNOWN, reduction="sum") / len(facts)
        for i, values in enumerate(logits)
    ]
    return torch.stack(losses).sum()


def vision_loss(
    tower: nn.Module,
    heads: Heads,
    clips: Clips,
    preset: Preset,
    seed: int,
    step: int,
    read: Read = read_layer,
) -> Tensor:
    """The loss of one batch; which one depends on seed and step alone."""
    draw = generator(seed, 1, step)
    count = preset.vision_clips
    chosen = draw.integers(len(clips.indices), size=count)
    frames = draw.integers(clips.frames.shape[1], size=(count, FRAMES))
    light = 1 + BRIGHTNESS * draw.standard_normal((count, FRAMES, 1, 1, 1))
    device = next(tower.parameters()).device
    pictures = pixels(clips.frames[chosen[:, None], frames]) * torch.from_numpy(light).float()
    features = read(tower, pictures.flatten(0, 1).to(device)).unflatten(0, (count, FRAMES))
    facts = torch.from_numpy(clips.facts[chosen]).long().to(device)
    patches = torch.from_numpy(clips.patches[chosen[:, None], frames]).long().to(device)
    return heads.loss(features, facts, patches)


@torch.no_grad()
def fact_accuracy(tower: nn.Module, heads: Heads, clips: Clips, batch: int = 16) -> dict[str, float]:
    """How often the heads are right about each fact, over all frames of each clip."""
    device = next(tower.parameters()).device
    right = np.zeros(len(FACTS))
    known = np.zeros(len(FACTS))
    for first in range(0, len(clips.indices), batch):
        part = slice(first, first + batch)
        pictures = pixels(clips.frames[part]).to(device)
        features = read_layer(tower, pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])
        facts = clips.facts[part]
        guesses = np.stack([v.argmax(1).cpu().numpy() for v in heads.read_facts(features)], 1)
        right += ((guesses == facts) & (facts != UNKNOWN)).sum(0)
        known += (facts != UNKNOWN).sum(0)
    return {name: float(r / k) for name, r, k in zip(FACTS, right, known, strict=True) if k}
