"""A video and a question as the inputs of a model: the prompt's wording, the frames, the processor's call."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from specfuse.data.video import read_video
from specfuse.hf.cache_names import CACHE_NAMES

FIRST_TURN = "USER: <video>\n{question} ASSISTANT:"
NEXT_TURN = " USER: {question} ASSISTANT:"
"""The prompt format Video-LLaVA was trained on (Vicuna's), without its optional system sentence."""

_PARTS = ("video", "processor", "question")
_MODEL_INPUTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", *CACHE_NAMES)


def with_video(model: PreTrainedModel, inputs: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Replaces ``video``, ``processor`` and ``question`` by the model inputs they stand for.

    Args:
        model: whose device and dtype the inputs get.
        inputs: what else the call gives for a prompt.
        kwargs: of a call; without these three they are returned as they are.

    Raises:
        ValueError: one of the three is missing, model inputs are given besides, the question is empty or
            holds a placeholder, or frames as :func:`load_frames` refuses them.
        FileNotFoundError: ``video`` names no file.
    """
    given = [name for name in _PARTS if kwargs.get(name) is not None]
    rest = {name: value for name, value in kwargs.items() if name not in _PARTS}
    if not given:
        return rest
    if missing := [name for name in _PARTS if name not in given]:
        raise ValueError(f"{missing[0]} is missing: video, processor and question belong together")
    both = [name for name in ("inputs", *rest) if name in _MODEL_INPUTS or name.startswith("pixel_values")]
    if both := [name for name in both if (inputs if name == "inputs" else rest[name]) is not None]:
        raise ValueError(
            f"{both[0]} and video are given: the prompt is made from video and question, or given"
        )
    question, processor = kwargs["question"], kwargs["processor"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question must be a non-empty string, got {question!r}")
    if "<video>" in question or "<image>" in question:
        raise ValueError(f"question must not hold image or video placeholders, got {question!r}")
    text = FIRST_TURN.replace("{question}", question)
    made = processor(text=text, videos=[load_frames(kwargs["video"])], return_tensors="pt")
    return rest | dict(made.to(model.device, model.dtype))


def load_frames(video: Any, num_frames: int = 8) -> np.ndarray:
    """Frames of a video as uint8 RGB [T, H, W, 3].

    Args:
        video: path of a video file (see `read_video`), uint8 RGB frames [T, H, W, 3], or a list of T arrays
            or PIL images.
        num_frames: T when `video` is a path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another shape or dtype, or a file as `read_video` refuses it.
    """
    if isinstance(video, str | os.PathLike):
        return read_video(video, num_frames)
    if isinstance(video, list | tuple):
        if not video:
            raise ValueError("video must hold at least one frame, got an empty list")
        shapes = {np.asarray(frame).shape for frame in video}
        if len(shapes) > 1:
            raise ValueError(f"video: all frames must have one shape, got {sorted(shapes)}")
        video = np.stack([np.asarray(frame) for frame in video])
    frames = video.cpu().numpy() if isinstance(video, Tensor) else np.asarray(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape or frames.dtype != np.uint8:
        raise ValueError(f"video must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    return frames
