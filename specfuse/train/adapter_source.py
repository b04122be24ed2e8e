"""Where an adapter's pairs come from: a file, or two models on the driving world."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specfuse.data.world import split
from specfuse.models.checkpoint import load_video_llava, read_config
from specfuse.train.adapter_features import encoder_pairs
from specfuse.train.adapter_pairs import Pairs, load_pairs
from specfuse.train.presets import Preset

FEATURES_OF = {"cross-attention": "keyframe", "expander": "expand"}
"""What a kind of adapter learns from unless it is told; the others "pooled"."""
MICRO_HELD_OUT = 8  # clips that a preset other than "tiny" holds out


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
    """Pairs of a file, or of both models' encoders on the clips of the preset.

    "tiny" takes all clips, so that all 1,042 held-out ones are measured.

    Raises:
        ValueError: neither a file nor both models, both of them, or what ``load_pairs``,
            ``load_video_llava`` and ``encoder_pairs`` raise.
        FileNotFoundError: no such file or directory.
    """
    if (file is None) == (target is None or drafter is None):
        raise ValueError("give either --pairs FILE or --target DIR and --drafter DIR")
    if file is not None:
        return load_pairs(file)
    assert target is not None and drafter is not None
    held_out = split("held_out")
    if preset.name != "tiny":
        held_out = held_out[:MICRO_HELD_OUT]
    clips = np.concatenate([split("train")[: preset.train_clips], held_out])
    model, _ = load_video_llava(target, dtype=torch.float32, device=device)
    source = load_eventgpt(drafter, device)

    def done(count: int) -> None:
        report("features", count / len(clips), f"{count} of {len(clips)} clips")

    return encoder_pairs(features, model, source, clips, cache, done)


def load_eventgpt(directory: str | os.PathLike[str], device: str = "cpu") -> Any:
    """An EventGPT of a local directory in float32 and eval mode.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: another kind of model, or missing or broken weights.
    """
    from specfuse.models.eventgpt import EventGptForConditionalGeneration

    model_type = read_config(directory).get("model_type")
    if model_type != "eventgpt":
        raise ValueError(f"{directory} holds a {model_type!r} model, not an 'eventgpt' one")
    try:
        model, info = EventGptForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{directory}: weights can not be loaded: {text}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{directory}: the weights lack {missing[0]}")
    return model.to(device).eval()
