"""Features of both encoders on the same clips: event pictures for the drafter, frames for the target."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specfuse.data.world import split
from specfuse.train.adapter_pairs import Pairs
from specfuse.train.batches import pixels
from specfuse.train.clip_store import load_clips
from specfuse.train.event_store import load_event_pictures
from specfuse.train.outputs import weights_digest
from specfuse.train.vision import read_layer

FEATURES = ("pooled", "tokens", "keyframe", "expand", "pixels")
"""What is paired; :func:`encoder_pairs` says how."""
GROUP = 64  # clips that are read at once


@torch.no_grad()
def target_tokens(model: Any, frames: np.ndarray) -> Tensor:
    """What a Video-LLaVA's tower says: ``[M, 8, H, W, 3]`` uint8 to ``[M, 8, 65, D]``, unprojected."""
    tower = model.model.video_tower
    pictures = pixels(frames).to(next(tower.parameters()).device)
    return read_layer(tower, pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])


@torch.no_grad()
def drafter_tokens(model: Any, pictures: np.ndarray) -> Tensor:
    """What an EventGPT's tower says: ``[M, n, H, W, 3]`` uint8 to its last hidden state ``[M, n, P, I]``."""
    tower = model.model.visual_tower
    values = pixels(pictures).to(next(tower.parameters()).device)
    return tower(values.flatten(0, 1)).last_hidden_state.unflatten(0, values.shape[:2])


def encoder_pairs(
    features: str,
    target: Any,
    drafter: Any,
    clips: Sequence[int] | np.ndarray,
    cache: str | os.PathLike[str],
    done: Callable[[int], object] = lambda clips: None,
) -> Pairs:
    """Pairs of the world's clips.

    - "pooled": one vector a clip, the mean over pictures (frames) and tokens; class tokens count as one.
    - "tokens": for each place the mean over the n pictures beside the mean over the 8 frames.
    - "keyframe": the same, with the tokens of the first frame as context and the mean over the seven later
      frames, which context does not hold, as target.
    - "expand": a quarter as many places of the drafter beside all patches of the target; the four patches
      of a place stand in a row, without class tokens.
    - "pixels": no encoder; the last picture of events beside the last frame, both in 0 to 1.

    Args:
        features: one of ``FEATURES``.
        target: a Video-LLaVA in eval mode.
        drafter: an EventGPT in eval mode.
        clips: indices in the world; the world's split says which are held out.
        cache: directory of drawn clips. What the towers say is kept there too.
        done: is told how many clips are through.

    Raises:
        ValueError: other features, or grids of patches of which neither is the other nor twice it.
    """
    if features not in FEATURES:
        raise ValueError(f"features must be one of {', '.join(FEATURES)}, got {features!r}")
    clips = np.asarray(clips, np.int64)
    held_out = torch.from_numpy(np.isin(clips, split("held_out")))
    if features == "pixels":
        source, wanted, context = *_pixel_pairs(clips, cache, done), None
    else:
        seen = _seen(target, drafter, clips, Path(cache), done)
        source, wanted, context = _paired(features, seen)
    models = f"drafter {weights_digest(drafter)}, target {weights_digest(target)}"
    about = f"{features} features of {len(clips)} clips, {models}"
    return Pairs(
        source, wanted, torch.from_numpy(clips), held_out, context=context, features=features, about=about
    )


def _paired(features: str, seen: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    source = seen["drafter"].float()
    first, later = seen["first"].float(), seen["later"].float()
    frames = (first + 7 * later) / 8
    if features == "pooled":
        return source.mean(1), frames.mean(1), None
    if features == "expand":
        fine = math.isqrt(frames.shape[1] - 1)
        return _at_grid(source[:, 1:], fine // 2), _blocks(frames[:, 1:]), None
    wanted = frames if features == "tokens" else later
    context = None if features == "tokens" else first
    if source.shape[1] != wanted.shape[1]:
        raise ValueError(f"drafter and target have {source.shape[1]} and {wanted.shape[1]} tokens a picture")
    return source, wanted, context


def _at_grid(tokens: Tensor, side: int) -> Tensor:
    """``[N, g * g, D]`` to ``[N, side * side, D]``, for g = side or means of 2 x 2 for g = 2 side."""
    grid = math.isqrt(tokens.shape[1])
    if grid == side:
        return tokens
    if grid != 2 * side:
        raise ValueError(f"drafter must have a grid of {side} or {2 * side} patches a side, got {grid}")
    return _blocks(tokens).unflatten(1, (-1, 4)).mean(2)


def _blocks(tokens: Tensor) -> Tensor:
    """``[N, g * g, D]`` in the order of 2 x 2 blocks: the four patches of a block stand in a row."""
    half = math.isqrt(tokens.shape[1]) // 2
    return tokens.unflatten(1, (half, 2, half, 2)).transpose(2, 3).flatten(1, 4)


def _seen(
    target: Any, drafter: Any, clips: np.ndarray, cache: Path, done: Callable[[int], object]
) -> dict[str, Tensor]:
    """Per clip the drafter's means over pictures, the target's first frame and its mean over later ones."""

    def of_target(group: np.ndarray) -> dict[str, Tensor]:
        frames = target_tokens(target, load_clips(group, cache).frames)
        return {"first": frames[:, 0], "later": frames[:, 1:].mean(1)}

    def of_drafter(group: np.ndarray) -> dict[str, Tensor]:
        return {"drafter": drafter_tokens(drafter, load_event_pictures(group, cache)).mean(1)}

    parts: dict[str, list[Tensor]] = {"drafter": [], "first": [], "later": []}
    # Of the towers alone: a drafter that was distilled behind the same tower sees the same.
    towers = target.model.video_tower, drafter.model.visual_tower
    sides = list(zip(map(weights_digest, towers), (of_target, of_drafter), strict=True))
    for start in range(0, len(clips), GROUP):
        group = clips[start : start + GROUP]
        for digest, compute in sides:
            path = cache / f"features-{digest}-{zlib.crc32(group.tobytes()):08x}.safetensors"
            for name, value in _kept(path, partial(compute, group)).items():
                parts[name].append(value)
        done(start + len(group))
    return {name: torch.cat(values) for name, values in parts.items()}


def _kept(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file, in half precision; where it is missing or broken they are computed first."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    try:
        return load_file(path)
    except (OSError, SafetensorError):
        tensors = {name: value.half().cpu().contiguous() for name, value in compute().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another run may read while this one writes.
    part = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, part)
    part.replace(path)
    return tensors


def _pixel_pairs(
    clips: np.ndarray, cache: str | os.PathLike[str], done: Callable[[int], object]
) -> tuple[Tensor, Tensor]:
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    for start in range(0, len(clips), GROUP):
        group = clips[start : start + GROUP]
        for kept, pictures in (
            (sources, load_event_pictures(group, cache)),
            (targets, load_clips(group, cache).frames),
        ):
            kept.append(torch.from_numpy(pictures[:, -1].reshape(len(group), -1)).half() / 255)
        done(start + len(group))
    return torch.cat(sources), torch.cat(targets)
