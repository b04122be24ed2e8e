"""Events of a simulated camera that looks at a video file."""

from __future__ import annotations

import os

import numpy as np

from specfuse.data.video import decoded_frames
from specfuse.data.video_file import picture, shown_size
from specfuse.data.video_open import checked_path
from specfuse.events.simulate import Sensor, simulate
from specfuse.events.stream import EventStream

UNTIMED_FPS = 25  # of a video that does not tell when its frames are shown


def simulate_video(
    path: str | os.PathLike[str],
    sensor: Sensor | None = None,
    size: tuple[int, int] | None = None,
    seconds: float | None = None,
    seed: int = 0,
) -> EventStream:
    """Events of a sensor that sees what the video shows, from its first frame on, at the frames' own times.

    Frames are turned as the file's display matrix tells; damaged packets are passed over with a warning.
    Between frames the logarithm of the brightness is taken as a straight line: motion of many pixels from one
    frame to the next becomes a fade. Videos of 100 frames a second and more do well.

    Args:
        path: the video file.
        sensor: what the sensor is like; ``Sensor()`` if None.
        size: ``(height, width)`` that frames are brought to; the first one's if None.
        seconds: how much of the video; all if None.
        seed: of mismatch and noise.

    Returns:
        Events with microseconds after the first frame.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no video, fewer than two frames in the time, or ``seconds`` not above 0.
    """
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    path = checked_path(path)
    pictures: list[np.ndarray] = []
    times: list[float] = []
    for frame in decoded_frames(path):
        size = size or shown_size(frame)
        at = len(times) / UNTIMED_FPS if frame.time is None else float(frame.time)
        if times and at <= times[-1]:
            continue  # a frame at the time of another one tells nothing
        if times and seconds is not None and at - times[0] > seconds:
            break
        pictures.append(picture(frame, "gray", size))
        times.append(at)
    if len(pictures) < 2:
        within = "" if seconds is None else f" in its first {seconds} seconds"
        raise ValueError(f"{path} has fewer than two frames at different times{within}")
    microseconds = np.round((np.array(times) - times[0]) * 1e6)
    return simulate(np.stack(pictures), microseconds, sensor or Sensor(), seed)
