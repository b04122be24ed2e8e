"""Pictures of a scene at any time, in any size: the same function for video frames and for events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from specfuse.data.world import shapes
from specfuse.data.world.camera import NEAR, Pose, pose, project, thing_in_camera
from specfuse.data.world.canvas import Canvas
from specfuse.data.world.ground import backdrop
from specfuse.data.world.light import Air, air, falling, sun
from specfuse.data.world.scene import FRAME_TIMES, Scene

_STACK = 32  # frames painted together: more fall out of the cache


class Pictures(NamedTuple):
    """T pictures of a scene with n things."""

    rgb: np.ndarray | None  # [T, size, size, 3] float32, 0 to 255
    owner: np.ndarray  # [T, size, size] int16, index of the thing a pixel shows, -1 for none
    visible: np.ndarray  # [n, T] pixels of each thing that are seen
    drawn: np.ndarray  # [n, T] pixels it would have with nothing in front


def render(scene: Scene, times: np.ndarray = FRAME_TIMES, size: int = 64, *, colour: bool = True) -> Pictures:
    """Draws a scene at T times.

    A picture depends on its own time only: the same whatever the frame rate and the other times asked for.

    Args:
        scene: what to draw.
        times: ``[T]`` seconds after the start of the clip.
        size: pixels along a side.
        colour: False to find out only what is visible, which takes half the time.

    Raises:
        ValueError: ``size`` below 8, or ``times`` not one-dimensional.
    """
    times = np.asarray(times, dtype=np.float64)
    if times.ndim != 1:
        raise ValueError(f"times must be [T], got shape {times.shape}")
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    stacks = [_render(scene, times[i : i + _STACK], size, colour) for i in range(0, len(times), _STACK)]
    if not stacks:
        stacks = [_render(scene, times, size, colour)]
    rgb, owner, visible, drawn = zip(*stacks, strict=True)
    join = np.concatenate
    return Pictures(join(rgb) if colour else None, join(owner), join(visible, axis=1), join(drawn, axis=1))


def luminance(scene: Scene, times: np.ndarray, size: int = 64) -> np.ndarray:
    """Brightness ``[T, size, size]`` float32, 0 to 255, not rounded (ITU-R BT.601)."""
    rgb = render(scene, times, size).rgb
    assert rgb is not None
    # Blending may overshoot by a rounding error.
    return np.clip(rgb @ np.array([0.299, 0.587, 0.114], np.float32), 0, 255)


def frames(scene: Scene, times: np.ndarray = FRAME_TIMES, size: int = 64) -> np.ndarray:
    """Video frames, uint8 ``[T, size, size, 3]``."""
    rgb = render(scene, times, size).rgb
    assert rgb is not None
    return np.clip(rgb + 0.5, 0, 255).astype(np.uint8)


def _render(scene: Scene, times: np.ndarray, size: int, colour: bool) -> Pictures:
    eye, weather = pose(scene, times), air(scene)
    rgb = backdrop(scene, eye, weather, size) if colour else None
    count = len(scene.things)
    owner = np.empty((len(times), size, size), np.int16)
    drawn = np.zeros((count, len(times)), np.int64)
    places = [thing_in_camera(scene, thing, eye, times) for thing in scene.things]
    for part, order in _runs(scene, places, len(times)):
        lens = Pose(eye.x[part], eye.z[part], eye.yaw[part], eye.bounce[part], eye.roll)
        canvas = Canvas(None if rgb is None else rgb[part], part.stop - part.start, size, count)
        if (disc := sun(scene, lens)) is not None and rgb is not None:
            canvas.ellipse(disc[0], disc[1], np.asarray(disc[2], np.float32), -1)
        if scene.road == "highway":
            _rails(canvas, lens, weather)
        for index in order:
            x, z = (a[part] for a in places[index])
            if (z > NEAR).any():
                shapes.paint(canvas, scene.things[index], int(index), lens, weather, (x, z), times[part])
        owner[part], drawn[:, part] = canvas.owner, canvas.drawn
    if rgb is not None:
        falling(scene, times, rgb)
    return Pictures(rgb, owner, _count(owner, count), drawn)


def _runs(
    scene: Scene, places: list[tuple[np.ndarray, np.ndarray]], frames_: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Consecutive frames that one order from far to near is right for, so that each run is painted at once.

    Only things that may overlap in the picture need the right order: the picture is the same as if every
    frame were sorted on its own, to a few grey levels where soft edges of neighbours meet.
    """
    count = len(places)
    if count == 0 or frames_ == 0:
        yield from [(slice(0, frames_), np.arange(0))][: frames_ > 0]
        return
    reaches = [shapes.reach(thing, x, z) for thing, (x, z) in zip(scene.things, places, strict=True)]
    left, right, depth = (np.array(field) for field in zip(*reaches, strict=True))  # [n, T] each
    overlap = (left[:, None] < right[None]) & (left[None] < right[:, None])
    before = overlap & (depth[:, None] > depth[None])  # [n, n, T]: the first is painted before the second
    start = 0
    while start < frames_:
        order = np.argsort(-depth[:, start], kind="stable")
        ordered = before[np.ix_(order, order)][:, :, start:]
        wrong = (ordered & np.tri(count, k=-1, dtype=bool)[:, :, None]).any((0, 1))
        stop = start + int(np.argmax(wrong)) if wrong.any() else frames_
        yield slice(start, stop), order
        start = stop


def _count(owner: np.ndarray, things: int) -> np.ndarray:
    rows = owner.reshape(len(owner), -1).astype(np.int64) + 1
    rows += np.arange(len(rows))[:, None] * (things + 1)
    counts = np.bincount(rows.reshape(-1), minlength=len(rows) * (things + 1))
    return counts.reshape(len(rows), things + 1)[:, 1:].T


def _rails(canvas: Canvas, eye: Pose, weather: Air) -> None:
    """The guard rails of a highway: on a straight road they look the same from everywhere."""
    steel = weather.on_thing((200, 205, 212), np.full(len(eye.x), 8.0))
    for side in (-1, 1):
        x = side * 5.6 - eye.x[:, None] + np.zeros(4)
        corners = project(eye, x, np.array([0.35, 1.25, 1.25, 0.35]), np.array([[2.0, 2.0, 70.0, 70.0]]))
        canvas.quad(corners, steel, -1)
