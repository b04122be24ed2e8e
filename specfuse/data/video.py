"""Uniformly sampled frames of a video file, decoded with PyAV."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def read_video(path: str | os.PathLike[str], num_frames: int = 8) -> np.ndarray:
    """Decodes ``num_frames`` frames spread evenly over a video.

    Equivalent to: all frames of the file, ``frames[[i * total // num_frames for i in range(num_frames)]]``.

    Any container and codec PyAV reads will do, animated GIF included. Only the frames taken are kept in
    memory. Rotation stored as metadata is not applied.

    Args:
        path: the video file.
        num_frames: T, how many frames to take; the file must hold at least as many.

    Returns:
        ``[T, H, W, 3]`` uint8 RGB, H and W those of the first frame.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: ``num_frames`` below 1, no video stream, too few frames, or an undecodable file.

    Source: Hugging Face's Video-LLaVA documentation, ``np.arange(0, total_frames, total_frames / 8)``.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such video file", str(path))
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    total = _declared_frames(path)
    frames, counted = _decode(path, _uniform(total, num_frames)) if total >= num_frames else ({}, -1)
    if counted != total:
        # Many containers do not say how many frames they hold, or say it wrong: count, then decode again.
        counted = counted if counted >= 0 else sum(1 for _ in decoded_frames(path))
        if counted < num_frames:
            raise ValueError(f"{path} holds {counted} frames, {num_frames} are needed")
        frames, _ = _decode(path, _uniform(counted, num_frames))
    return np.stack([frames[index] for index in _uniform(counted, num_frames)])


def _uniform(total: int, num_frames: int) -> list[int]:
    return [i * total // num_frames for i in range(num_frames)]


def _open(path: Path) -> Any:
    import av

    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ValueError(f"{path} can not be read as a video: {_reason(error)}") from None
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path} has no video stream")
    return container


def _declared_frames(path: Path) -> int:
    with _open(path) as container:
        return container.streams.video[0].frames


def decoded_frames(path: Path) -> Iterator[Any]:
    """Yields the frames of a file's first video stream, as PyAV gives them.

    Raises:
        ValueError: no video stream, or an undecodable file.
    """
    import av

    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        try:
            yield from container.decode(stream)
        except (av.FFmpegError, OSError) as error:
            raise ValueError(f"{path} can not be decoded: {_reason(error)}") from None


def _decode(path: Path, wanted: list[int]) -> tuple[dict[int, np.ndarray], int]:
    """Returns the wanted frames as RGB by index, and the number of frames in the file."""
    kept: dict[int, np.ndarray] = {}
    size: dict[str, int] = {}
    index = -1
    for index, frame in enumerate(decoded_frames(path)):
        # A stream may change its resolution; every frame is brought to the first one's.
        size = size or {"width": frame.width, "height": frame.height}
        if index in wanted:
            kept[index] = frame.to_ndarray(format="rgb24", **size)
    return kept, index + 1


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.split("\n", 1)[0]
