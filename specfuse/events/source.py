"""EventFile: the events of a recording, read piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from specfuse.events.stream import EventStream, first_at, whole

BLOCK = 1 << 20  # events looked at together in the search for the largest coordinate


@dataclass
class EventFile:
    """Four columns that are sliced, on disk or in memory; a context manager.

    ``specfuse.events.open_events`` makes them. What a slice holds is checked when it is read.

    Args:
        path: of the file, for messages.
        format: its name in ``specfuse.events.FORMATS``.
        columns: x, y, t and p, ``[E]`` each: anything with a length and slices that are arrays, and perhaps
            with ``first_at(time)``, ``largest`` or ``blocks()`` of its own. ``t`` counts microseconds after
            ``offset_us``.
        size: ``(height, width)`` of the sensor; None where the file does not tell: then the largest
            coordinates of the whole file decide.
        take: x, y, t and p of the events from one number up to another, where that is cheaper than a slice
            of each column.
        offset_us: added to ``t``.
        ms_to_idx: number of the first event at or after every millisecond of ``t``, if the file has it.
        release: closes what the columns are read from.
    """

    path: str
    format: str
    columns: dict[str, Any]
    size: tuple[int, int] | None = None
    offset_us: int = 0
    ms_to_idx: np.ndarray | None = None
    release: Callable[[], object] = field(default=lambda: None, repr=False)
    take: Callable[[int, int], list[np.ndarray]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.size is not None:
            if len(self.size) != 2:
                raise ValueError(f"size must be (height, width), got {self.size!r}")
            self.size = whole("height", self.size[0]), whole("width", self.size[1])
        for name, column in self.columns.items():
            if getattr(column, "ndim", 1) != 1:
                raise ValueError(f"{self.path}: {name} must be one-dimensional, got shape {column.shape}")
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{self.path}: x, y, t and p must be equally long, got {lengths}")
        for name, column in self.columns.items():
            if column.dtype.kind not in "iubf":
                raise ValueError(f"{self.path}: {name} must hold numbers, got {column.dtype}")

    def __len__(self) -> int:
        return len(self.columns["t"])

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives back what the file holds; slices that were read stay valid."""
        self.release()

    @cached_property
    def sensor(self) -> tuple[int, int]:
        """``(height, width)``, the file's or the largest coordinates' of the whole file."""
        if self.size is not None:
            return self.size
        return _largest(self.columns["y"]) + 1, _largest(self.columns["x"]) + 1

    @property
    def first_us(self) -> int:
        """Time of the first event, microseconds; 0 where there are none."""
        return self._time(0) + self.offset_us if len(self) else 0

    @property
    def last_us(self) -> int:
        """Time of the last event, microseconds; 0 where there are none."""
        return self._time(len(self) - 1) + self.offset_us if len(self) else 0

    def _time(self, number: int) -> int:
        time = self.columns["t"][number]
        if self.columns["t"].dtype.kind == "f":
            _refuse_fractions(np.asarray([time]), self.path, number)
        return int(time)

    def read(self, start_us: int | None = None, end_us: int | None = None) -> EventStream:
        """Events with ``start_us <= t < end_us``; from the first and to the last where None.

        Columns that are memory-mapped stay so, read-only.

        Raises:
            ValueError: no events in the slice, ``end_us`` before ``start_us``, or events that are not valid.
        """
        if start_us is not None and end_us is not None and end_us < start_us:
            raise ValueError(f"end_us must not be before start_us, got {start_us} and {end_us}")
        if self.columns["t"].dtype.kind == "f" and len(self):
            self._time(0), self._time(len(self) - 1)  # seconds would be searched in vain
        first = 0 if start_us is None else self.number_at(start_us)
        last = len(self) if end_us is None else self.number_at(end_us)
        if first >= last and not (start_us is None and end_us is None):
            times = ["its beginning" if start_us is None else f"{start_us} us"]
            times.append("its end" if end_us is None else f"{end_us} us")
            held = f"from {self.first_us} to {self.last_us} us" if len(self) else "none"
            raise ValueError(f"{self.path}: no events between {times[0]} and {times[1]}; it holds {held}")
        return self.by_index(first, last)

    def by_index(self, start: int, stop: int) -> EventStream:
        """Events number ``start`` to ``stop - 1``.

        Raises:
            ValueError: not ``0 <= start <= stop <= len(self)``, or events that are not valid.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(
                f"start and stop must be 0 <= start <= stop <= {len(self)}, got {start} and {stop}"
            )
        if self.take is not None:
            x, y, t, p = self.take(start, stop)
        else:
            x, y, t, p = (self.columns[name][start:stop] for name in "xytp")
        if self.offset_us or t.dtype != np.int64:
            if t.dtype.kind == "f":
                _refuse_fractions(t, self.path)
            _refuse_overflow(t, self.offset_us, self.path)
            t = t.astype(np.int64)
            t += self.offset_us
        try:
            return EventStream(x, y, t, p, self.sensor[1], self.sensor[0])
        except ValueError as error:
            where = f"{self.path}: " if start == 0 else f"{self.path}, counted from event {start}: "
            hint = "; size=(height, width) gives another sensor" if "outside the sensor" in str(error) else ""
            raise ValueError(f"{where}{error}{hint}") from None

    def number_at(self, time_us: int) -> int:
        """Number of the first event at or after a time; ``len(self)`` if there is none.

        Raises:
            ValueError: the file's own index of milliseconds is wrong there.
        """
        wanted, t = int(time_us) - self.offset_us, self.columns["t"]
        if self.ms_to_idx is None:
            return t.first_at(wanted) if hasattr(t, "first_at") else first_at(t, wanted)
        if wanted <= 0:
            return 0
        low, high = (self._indexed(ms) for ms in (wanted // 1000, -(-wanted // 1000)))
        # One event more on either side shows whether the index tells the truth.
        begin, end = max(low - 1, 0), min(high + 1, len(self))
        number = begin + first_at(t[begin:end], wanted)
        if not low <= number <= high:
            raise ValueError(
                f"{self.path}: ms_to_idx is wrong near millisecond {wanted // 1000}: it tells events {low} "
                f"to {high}, the first at or after {wanted} us is not one of them"
            )
        return number

    def _indexed(self, millisecond: int) -> int:
        assert self.ms_to_idx is not None
        if millisecond >= len(self.ms_to_idx):
            return len(self)
        number = int(self.ms_to_idx[millisecond])
        if not 0 <= number <= len(self):
            raise ValueError(
                f"{self.path}: ms_to_idx[{millisecond}] is {number}, but the file holds {len(self)} events"
            )
        return number


def blocks(column: Any) -> Iterator[np.ndarray]:
    """A column in pieces of at most BLOCK."""
    if hasattr(column, "blocks"):
        yield from column.blocks()
        return
    for start in range(0, len(column), BLOCK):
        yield np.asarray(column[start : start + BLOCK])


def _largest(column: Any) -> int:
    """The largest coordinate, at most 65535; what is no place on any sensor is named by EventStream."""
    if hasattr(column, "largest"):
        return column.largest
    most = 0
    for part in blocks(column):
        if part.dtype.kind == "f":
            part = part[np.isfinite(part)]
        # As an integer of Python: narrow types hold no larger one to compare with.
        most = max(most, int(part.max())) if part.size else most
    return min(most, 65535)


def _refuse_fractions(t: np.ndarray, path: str, first: int = 0) -> None:
    t = t.astype(np.float64, copy=False)
    wrong = ~(np.abs(t) < 2.0**53) | (t != np.floor(t))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"{path}: t[{first + i}] is {t[i]}: must be a whole number of microseconds (are these seconds?)"
        )


def _refuse_overflow(t: np.ndarray, offset_us: int, path: str) -> None:
    # The ends alone: a middle that wraps around makes time go back, which is refused anyway.
    for time in (int(t[0]) + offset_us, int(t[-1]) + offset_us) if len(t) else (offset_us,):
        if not -(2**63) <= time < 2**63:
            raise ValueError(f"{path}: a time of {time} us does not fit 64 bits")
