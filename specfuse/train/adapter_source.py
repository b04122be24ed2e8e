"""Where an adapter's pairs come from: a file, or two models on the driving world."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from specfuse.data.world import split
from specfuse.models.checkpoint import load_eventgpt, load_video_llava
from specfuse.train import adapter_decoder, adapter_features
from specfuse.train.adapter_pairs import Pairs, load_pairs
from specfuse.train.presets import Preset

FEATURES_OF = {
    "cross-attention": "keyframe",
    "expander": "expand",
    "token-alignment": "states",
    "compression": "drafts",
}
"""What a kind of adapter learns from unless it is told; the others "pooled"."""
TRAIN_CLIPS = {"tiny": 4166, "micro": 8}
MICRO_HELD_OUT = 4  # clips that a preset other than "tiny" holds out


def open_pairs(
    file: Path | None,
    target: Path | None,
    drafter: Path | None,
    features: str,
    preset: Preset,
    cache: str | os.PathLike[str],
    device: str,
    report: Callable[[str, float, str], None],
) -> Pairs:
    """Pairs of a file, or of both models' encoders or decoders on clips of the preset.

    Of encoders "tiny" takes all clips, so that all 1,042 held-out ones are measured.

    Raises:
        ValueError: neither a file nor both models, both of them, or what ``load_pairs``,
            ``load_video_llava`` and ``encoder_pairs`` raise.
        FileNotFoundError: no such file or directory.
    """
    given = sum(where is not None for where in (target, drafter))
    if given != (2 if file is None else 0):
        raise ValueError("give either --pairs FILE or --target DIR and --drafter DIR")
    if file is not None:
        return load_pairs(file)
    assert target is not None and drafter is not None
    models = load_video_llava(target, dtype=torch.float32, device=device)
    drafters = load_eventgpt(drafter, dtype=torch.float32, device=device)
    if features in adapter_decoder.FEATURES:
        return adapter_decoder.decoder_pairs(features, models, drafters, preset, cache, report)
    if features not in adapter_features.FEATURES:
        known = ", ".join((*adapter_features.FEATURES, *adapter_decoder.FEATURES))
        raise ValueError(f"features must be one of {known}, got {features!r}")
    held_out = split("held_out")
    if preset.name != "tiny":
        held_out = held_out[:MICRO_HELD_OUT]
    clips = np.concatenate([split("train")[: TRAIN_CLIPS[preset.name]], held_out])

    def done(count: int) -> None:
        report("features", count / len(clips), f"{count} of {len(clips)} clips")

    return adapter_features.encoder_pairs(features, models[0], drafters[0], clips, cache, done)
