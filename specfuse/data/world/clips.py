"""The driving world's entry: clips by index, with frames, events, questions and answers."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from specfuse.data.world import render
from specfuse.data.world.questions import Question, ask
from specfuse.data.world.scene import CLIP_SECONDS, FRAME_TIMES, Scene
from specfuse.data.world.splits import WORLD_SEED
from specfuse.data.world.visible import View, build_scene
from specfuse.events.simulate import Sensor, simulate
from specfuse.events.stream import EventStream


@dataclass(frozen=True)
class Clip:
    """One second of driving. Frames are drawn when they are first asked for."""

    index: int
    scene: Scene
    view: View
    size: int
    world_seed: int = WORLD_SEED

    @property
    def drive(self) -> int:
        """The drive that the clip was cut from."""
        return self.scene.drive

    @cached_property
    def frames(self) -> np.ndarray:
        """``[8, size, size, 3]`` uint8 RGB, evenly spread over the second."""
        return render.frames(self.scene, FRAME_TIMES, self.size)

    @cached_property
    def questions(self) -> list[Question]:
        """Questions with the answers of target and drafter."""
        return ask(self.view, self.world_seed)


def clip(index: int, size: int = 64, world_seed: int = WORLD_SEED) -> Clip:
    """The clip of an index; always the same for the same three numbers.

    Args:
        index: 0 to 5,207.
        size: pixels along a side of a frame. What is asked about does not depend on it.
        world_seed: another number is another world.

    Raises:
        IndexError: there is no such clip.
        ValueError: ``size`` below 8.
    """
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    index = operator.index(index)  # numpy's integers overflow where the world draws its numbers
    scene, view = build_scene(index, world_seed)
    return Clip(index, scene, view, size, world_seed)


def events(
    index: int, size: int = 64, rate: int = 128, sensor: Sensor | None = None, world_seed: int = WORLD_SEED
) -> EventStream:
    """What an event camera at the same place sees during a clip: the second from 0 to 1,000,000 microseconds.

    Args:
        index: 0 to 5,207.
        size: pixels along a side of the sensor.
        rate: pictures a second that the brightness is followed with.
        sensor: its thresholds and noise; noise and mismatch are seeded by clip and world.
        world_seed: another number is another world.

    Raises:
        IndexError: there is no such clip.
        ValueError: ``rate`` below 2, or ``size`` below 8.
    """
    if rate < 2:
        raise ValueError(f"rate must be at least 2 pictures a second, got {rate}")
    index = operator.index(index)
    scene = build_scene(index, world_seed)[0]
    times = np.linspace(0, CLIP_SECONDS, rate + 1)
    brightness = render.luminance(scene, times, size)
    return simulate(brightness, times * 1e6, sensor or Sensor(), seed=(world_seed, index))
