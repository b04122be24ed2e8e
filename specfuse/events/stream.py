"""EventStream: what an event camera records, and cutting pieces out of it."""

from __future__ import annotations

import math
import operator
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True)
class EventStream:
    """E events in order of time.

    Columns are converted to the types below where no value changes; anything else is refused.

    Args:
        x: ``[E]`` uint16, column, below ``width``.
        y: ``[E]`` uint16, row, below ``height``.
        t: ``[E]`` int64, microseconds, never decreasing.
        p: ``[E]`` uint8, 1 for brighter (ON), 0 for darker (OFF). Given as 1 and -1, -1 becomes 0.
        width: of the sensor, pixels.
        height: of the sensor, pixels.

    Raises:
        ValueError: names the first event that is wrong, and how.
    """

    x: np.ndarray
    y: np.ndarray
    t: np.ndarray
    p: np.ndarray
    width: int
    height: int

    def __post_init__(self) -> None:
        for side in ("width", "height"):
            value = whole(side, getattr(self, side))
            object.__setattr__(self, side, value)  # of Python: products of narrow numbers overflow
            if not 1 <= value <= 65536:
                raise ValueError(f"{side} must be 1 to 65536 pixels, got {value}")
        for name, kind in (("x", np.uint16), ("y", np.uint16), ("t", np.int64), ("p", np.uint8)):
            object.__setattr__(self, name, _column(name, getattr(self, name), kind, np.shape(self.t)[:1]))
        _inside("x", self.x, self.width, "width")
        _inside("y", self.y, self.height, "height")
        if (back := self.t[1:] < self.t[:-1]).any():
            i = int(np.argmax(back)) + 1
            raise ValueError(
                f"t[{i}] = {self.t[i]} comes after t[{i - 1}] = {self.t[i - 1]}: time must not go back"
            )

    def __len__(self) -> int:
        return len(self.t)

    @property
    def duration_us(self) -> int:
        """Microseconds from the first to the last event; 0 if there are none."""
        return int(self.t[-1]) - int(self.t[0]) if len(self) else 0

    def between(self, start_us: int, stop_us: int) -> EventStream:
        """Events with ``start_us <= t < stop_us``; shares memory with this stream.

        Raises:
            ValueError: ``stop_us`` before ``start_us``.
        """
        if stop_us < start_us:
            raise ValueError(f"stop_us must not be before start_us, got {start_us} and {stop_us}")
        return self._part(first_at(self.t, start_us), first_at(self.t, stop_us))

    def by_index(self, start: int, stop: int) -> EventStream:
        """Events number ``start`` to ``stop - 1``; shares memory with this stream.

        Raises:
            ValueError: not ``0 <= start <= stop <= len(self)``.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(
                f"start and stop must be 0 <= start <= stop <= {len(self)}, got {start} and {stop}"
            )
        return self._part(start, stop)

    def split(self, parts: int) -> list[EventStream]:
        """``parts`` pieces of ``len(self) // parts`` events each; the last one takes the rest as well.

        Raises:
            ValueError: ``parts`` below 1.
        """
        return [self._part(a, b) for a, b in pairwise(shares(len(self), parts))]

    def every(self, count: int) -> list[EventStream]:
        """Pieces of ``count`` events each, in order; the last one holds what is left. None of no events.

        Raises:
            ValueError: ``count`` below 1.
        """
        count = operator.index(count)
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        return [self._part(a, min(a + count, len(self))) for a in range(0, len(self), count)]

    def _part(self, first: int, last: int) -> EventStream:
        # A piece of a valid stream is valid: nothing is checked again, which makes slicing free.
        piece = object.__new__(EventStream)
        for name in ("x", "y", "t", "p"):
            object.__setattr__(piece, name, getattr(self, name)[first:last])
        object.__setattr__(piece, "width", self.width)
        object.__setattr__(piece, "height", self.height)
        return piece


def shares(count: int, parts: int) -> list[int]:
    """Where ``parts`` pieces of ``count // parts`` begin, and where the last, which takes the rest, ends.

    Raises:
        ValueError: ``parts`` below 1.
    """
    parts = operator.index(parts)
    if parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}")
    return [count // parts * i for i in range(parts)] + [count]


def first_at(t: Any, time: float) -> int:
    """Number of the first of ``[E]`` rising times at or after ``time``: exact, whatever the type of ``t``."""
    if isinstance(t, np.ndarray) and t.dtype == np.int64 and t.flags.c_contiguous and t.flags.aligned:
        limits = np.iinfo(np.int64)
        if time > limits.max:
            return len(t)
        return int(np.searchsorted(t, np.int64(max(math.ceil(time), limits.min)), side="left"))
    # NumPy copies the whole of any other column, and compares unsigned and signed numbers as floats.
    return bisect_left(t, time, key=lambda value: value.item())


def whole(name: str, value: Any) -> int:
    """A number of pixels as an integer of Python.

    Raises:
        ValueError: it is not whole.
    """
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number != value:
        raise ValueError(f"{name} must be a whole number of pixels, got {value!r}")
    return number


def _column(name: str, values: Any, kind: type, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or values.shape != shape:
        length = shape[0] if shape else 1
        raise ValueError(
            f"{name} must be one-dimensional and as long as t ({length}), got shape {values.shape}"
        )
    if values.dtype.kind not in "iubf":
        raise ValueError(f"{name} must hold numbers, got {values.dtype}")
    if name == "p":
        return _polarity(values)
    if values.dtype == kind:
        return values
    info = np.iinfo(kind)
    if values.dtype.kind == "f":
        values = values.astype(np.float64)  # halves hold no limit to compare with
        # NaN and infinity compare false with everything; the largest int64 is not a float.
        wrong = ~((values >= info.min) & (values < float(info.max + 1)) & (values == np.floor(values)))
    else:
        wrong = (values < info.min) | (values > info.max)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"{name}[{i}] is {values[i]}: must be a whole number that fits {np.dtype(kind).name}"
        )
    return values.astype(kind)


def _polarity(values: np.ndarray) -> np.ndarray:
    """0 and 1, as uint8, of a column of 0 and 1 or of -1 and 1."""
    if values.dtype == np.uint8 and (not len(values) or values.max() <= 1):
        return values
    on = values == 1
    negative = values == -1 if values.dtype.kind in "if" else np.zeros(0, bool)
    down = negative.any()
    wrong = ~on & ~(negative if down else values == 0)
    if wrong.any():
        i = int(np.argmax(wrong))
        if down and values[i] == 0:
            j = int(np.argmax(negative))
            raise ValueError(f"p[{i}] is 0 and p[{j}] is -1: polarity must be 0 or 1, or else -1 or 1")
        raise ValueError(f"p[{i}] is {values[i]}: polarity must be 0 or 1 (or -1 or 1)")
    return on.astype(np.uint8)


def _inside(name: str, values: np.ndarray, limit: int, side: str) -> None:
    if len(values) and int(values.max()) >= limit:
        i = int(np.argmax(values >= limit))
        raise ValueError(f"{name}[{i}] is {values[i]}, outside the sensor: {side} is {limit}")
