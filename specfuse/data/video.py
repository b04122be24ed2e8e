"""Uniformly sampled frames of a video file, decoded with PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from specfuse.data.video_file import VideoFrames, picture, shown_size
from specfuse.data.video_open import checked_path


def read_video(path: str | os.PathLike[str], num_frames: int = 8) -> np.ndarray:
    """Decodes ``num_frames`` frames spread evenly over a video.

    Equivalent to: all frames of the file, ``frames[[i * total // num_frames for i in range(num_frames)]]``.

    Any container and codec PyAV reads will do, animated GIF included; of several video streams the one that
    players show, never cover art. Frames are turned and mirrored as the file's display matrix tells. Damaged
    packets are passed over. Only the frames taken are kept in memory.

    Args:
        path: the video file. Never a URL or a pattern, whatever the name looks like.
        num_frames: T, how many frames to take; the file must hold at least as many.

    Returns:
        ``[T, H, W, 3]`` uint8 RGB, H and W those of the first frame as it is shown.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: ``num_frames`` below 1, no video stream, too few frames, text or events instead of a
            video, or a file of which fewer than a quarter can be decoded.

    Warns:
        UserWarning: frames are lost in a damaged or truncated file; tells how many.

    Source: Hugging Face's Video-LLaVA documentation, ``np.arange(0, total_frames, total_frames / 8)``.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    frames = VideoFrames(checked_path(path))
    total = frames.announced
    taken, counted = _take(frames, _uniform(total, num_frames)) if total >= num_frames else ({}, -1)
    if counted != total:
        # Many containers do not say how many frames they hold, or say it wrong: count, then decode again.
        counted = counted if counted >= 0 else sum(1 for _ in frames)
        if counted >= num_frames:
            taken, _ = _take(frames, _uniform(counted, num_frames))
    frames.report()
    if counted < num_frames:
        raise ValueError(f"{frames.path} holds {counted} frames, {num_frames} are needed")
    return np.stack([taken[index] for index in _uniform(counted, num_frames)])


def decoded_frames(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yields the frames of a video file, as PyAV gives them: not turned, see ``video_file.picture``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as :func:`read_video`.
    """
    frames = VideoFrames(checked_path(path))
    try:
        yield from frames
    except GeneratorExit:
        frames.report()  # of what was asked for
        raise
    frames.report()


def _uniform(total: int, num_frames: int) -> list[int]:
    return [i * total // num_frames for i in range(num_frames)]


def _take(frames: VideoFrames, wanted: list[int]) -> tuple[dict[int, np.ndarray], int]:
    """Returns the wanted frames as RGB by index, and the number of frames in the file."""
    kept: dict[int, np.ndarray] = {}
    size: tuple[int, int] | None = None
    index = -1
    for index, frame in enumerate(frames):
        # A stream may change its resolution; every frame is brought to the first one's.
        size = size or shown_size(frame)
        if index in wanted:
            kept[index] = picture(frame, "rgb24", size)
    return kept, index + 1
