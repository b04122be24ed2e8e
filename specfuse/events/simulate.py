"""An event camera in numbers: brightness pictures in, events out.

Every pixel remembers the logarithm of the brightness at its last event. When the logarithm has moved by the
pixel's own threshold, the pixel fires and moves its memory by as much. Between two pictures the logarithm is
taken as a straight line, so that each event has the time at which the line crosses its level.

Source: Hu, Liu, Delbruck 2021, "v2e: From video frames to realistic DVS events"; crossing times as in ESIM
(Rebecq, Gehrig, Scaramuzza 2018).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from specfuse.events.stream import EventStream

LINEAR_BELOW = 20.0  # of 255: the logarithm is a line from there to 0, where a photodiode is all noise


@dataclass(frozen=True)
class Sensor:
    """What a sensor is like. The defaults are a quiet one.

    Args:
        threshold_on: change of the natural logarithm that fires ON.
        threshold_off: the same for OFF.
        mismatch: standard deviation of the thresholds from pixel to pixel, in the same unit.
        refractory_us: microseconds after an event in which its pixel is silent.
        leak_hz: ON events a second that a pixel fires in constant light.
        shot_hz: noise events a second of a dark pixel; bright ones have a quarter.

    Raises:
        ValueError: a threshold not above 0, or another value below 0.
    """

    threshold_on: float = 0.2
    threshold_off: float = 0.2
    mismatch: float = 0.02
    refractory_us: int = 1000
    leak_hz: float = 0.05
    shot_hz: float = 0.1

    def __post_init__(self) -> None:
        for name in ("threshold_on", "threshold_off"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("mismatch", "refractory_us", "leak_hz", "shot_hz"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be below 0, got {getattr(self, name)}")


IDEAL = Sensor(mismatch=0.0, refractory_us=0, leak_hz=0.0, shot_hz=0.0)


def log_brightness(brightness: np.ndarray) -> np.ndarray:
    """Natural logarithm of 0 to 255, continued below LINEAR_BELOW as a straight line to 0; float64."""
    brightness = np.asarray(brightness, np.float64)
    return np.where(
        brightness < LINEAR_BELOW,
        brightness * (np.log(LINEAR_BELOW) / LINEAR_BELOW),
        np.log(np.maximum(brightness, LINEAR_BELOW)),
    )


def simulate(
    brightness: np.ndarray, times_us: np.ndarray, sensor: Sensor = IDEAL, seed: int | Sequence[int] = 0
) -> EventStream:
    """Events of a sensor that looks at a sequence of pictures.

    Args:
        brightness: ``[T, H, W]``, 0 to 255, whole or not.
        times_us: ``[T]`` microseconds, rising.
        sensor: what the sensor is like.
        seed: of mismatch and noise; the same seed gives the same events.

    Returns:
        Events in order of time, all in ``[times_us[0], times_us[-1])``.

    Raises:
        ValueError: fewer than two pictures, shapes that do not match, times that do not rise, brightness
            outside 0 to 255 or not a number.
    """
    brightness, times_us = np.asarray(brightness), np.asarray(times_us, np.float64)
    _check(brightness, times_us)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    _, height, width = brightness.shape
    parts = list(_crossings(brightness, times_us, sensor, rng))
    parts += _shot_noise(brightness, times_us, sensor, rng)
    pixel, t, p = (np.concatenate(column) for column in zip(*parts, strict=True))
    stamp = np.floor(t).astype(np.int64)
    # The end is open: an event on it belongs to what follows.
    inside = (stamp >= times_us[0]) & (stamp < times_us[-1])
    pixel, stamp, p = _rested(pixel[inside], stamp[inside], p[inside], sensor.refractory_us)
    order = np.lexsort((pixel, stamp))
    pixel, stamp, p = pixel[order], stamp[order], p[order]
    return EventStream(
        (pixel % width).astype(np.uint16), (pixel // width).astype(np.uint16), stamp, p, width, height
    )


Columns = tuple[np.ndarray, np.ndarray, np.ndarray]  # pixel [E] int64, time [E] float64, polarity [E] uint8


def _crossings(
    brightness: np.ndarray, times_us: np.ndarray, sensor: Sensor, rng: np.random.Generator
) -> Iterator[Columns]:
    """Events where the logarithm crosses a pixel's levels, picture by picture."""
    pixels = brightness[0].size
    on, off = (
        np.maximum(rng.normal(level, sensor.mismatch, pixels), 0.1 * level)
        for level in (sensor.threshold_on, sensor.threshold_off)
    )
    # Leaking is a slow rise of everything: in constant light a pixel fires ON `leak_hz` times a second.
    leak = sensor.leak_hz * on * 1e-6
    before = log_brightness(brightness[0]).reshape(-1)
    # Where in its way to the next event a pixel starts is unknown, if it has been leaking before.
    memory = before - (rng.uniform(0, 1, pixels) * on if sensor.leak_hz else 0.0)
    empty = np.empty(0)
    yield empty.astype(np.int64), empty, empty.astype(np.uint8)
    for i in range(1, len(times_us)):
        after = log_brightness(brightness[i]).reshape(-1) + leak * (times_us[i] - times_us[0])
        change = after - memory
        count = np.floor(np.where(change > 0, change / on, change / -off)).astype(np.int64)
        firing = np.flatnonzero(count)
        if len(firing):
            step = np.where(change > 0, on, -off)[firing]
            pixel = np.repeat(np.arange(len(firing)), count[firing])
            rank = (
                np.arange(len(pixel)) - np.repeat(np.cumsum(count[firing]) - count[firing], count[firing]) + 1
            )
            level = memory[firing][pixel] + rank * step[pixel]
            start, rise = before[firing][pixel], (after - before)[firing][pixel]
            share = np.clip((level - start) / np.where(rise == 0, 1, rise), 0, 1)
            yield (
                firing[pixel],
                times_us[i - 1] + share * (times_us[i] - times_us[i - 1]),
                (step[pixel] > 0).astype(np.uint8),
            )
            memory[firing] += count[firing] * step
        before = after


def _shot_noise(
    brightness: np.ndarray, times_us: np.ndarray, sensor: Sensor, rng: np.random.Generator
) -> list[Columns]:
    """Events without a cause; more in the dark (v2e: a quarter of the rate in full light)."""
    if not sensor.shot_hz:
        return []
    seconds = (times_us[-1] - times_us[0]) * 1e-6
    rate = sensor.shot_hz * (1 - 0.75 * brightness.mean(0, dtype=np.float64).reshape(-1) / 255)
    count = rng.poisson(rate * seconds)
    pixel = np.repeat(np.arange(len(rate)), count)
    t = rng.uniform(times_us[0], times_us[-1], len(pixel))
    return [(pixel, t, rng.integers(0, 2, len(pixel)).astype(np.uint8))]


def _rested(pixel: np.ndarray, t: np.ndarray, p: np.ndarray, refractory_us: int) -> Columns:
    """Leaves out events less than ``refractory_us`` after the last one of their pixel that was kept."""
    order = np.lexsort((t, pixel))
    pixel, t, p = pixel[order], t[order], p[order]
    if refractory_us == 0 or not len(t):
        return pixel, t, p
    starts = np.flatnonzero(np.r_[True, pixel[1:] != pixel[:-1]])
    length = np.diff(np.r_[starts, len(t)])
    keep = np.zeros(len(t), bool)
    keep[starts] = True
    last = t[starts].copy()
    # The k-th events of all pixels at once: whether one is kept depends on those before it.
    for k in range(1, int(length.max())):
        alive = np.flatnonzero(length > k)
        here = starts[alive] + k
        good = t[here] - last[alive] >= refractory_us
        keep[here[good]] = True
        last[alive[good]] = t[here[good]]
    return pixel[keep], t[keep], p[keep]


def _check(brightness: np.ndarray, times_us: np.ndarray) -> None:
    if brightness.ndim != 3 or brightness.shape[0] < 2:
        raise ValueError(
            f"brightness must be [T, H, W] with at least two pictures, got shape {brightness.shape}"
        )
    if times_us.shape != brightness.shape[:1]:
        raise ValueError(
            f"times_us must be [{brightness.shape[0]}], one per picture, got shape {times_us.shape}"
        )
    if not (np.diff(times_us) > 0).all():
        i = int(np.argmax(~(np.diff(times_us) > 0))) + 1
        raise ValueError(f"times_us must rise, but times_us[{i}] = {times_us[i]} follows {times_us[i - 1]}")
    if not (np.abs(times_us) < 2.0**53).all():
        i = int(np.argmax(~(np.abs(times_us) < 2.0**53)))
        raise ValueError(f"times_us[{i}] is {times_us[i]}: must be a number of microseconds below 2^53")
    if not ((brightness >= 0) & (brightness <= 255)).all():
        raise ValueError("brightness must be 0 to 255 everywhere")
