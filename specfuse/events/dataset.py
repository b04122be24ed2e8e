"""Many samples out of recordings: a torch dataset of time windows, and reading ahead in threads.

Windows of an uncompressed ``.npz`` come from a memory map: nothing is copied before it is drawn. HDF5 is
unpacked by one thread of a process at a time; convert such recordings once (``specfuse events convert``), or
read them with the processes of a ``torch.utils.data.DataLoader``.
"""

from __future__ import annotations

import operator
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

from torch.utils.data import Dataset

from specfuse.events.files import open_events
from specfuse.events.render import render_eventgpt
from specfuse.events.source import EventFile
from specfuse.events.stream import EventStream

Item = TypeVar("Item", covariant=True)


class Samples(Protocol[Item]):
    """What can be read ahead: a list, an EventWindows, any map-style dataset of torch."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Item: ...


class Window(NamedTuple):
    """A slice of a recording: ``start_us <= t < end_us``."""

    path: str
    start_us: int
    end_us: int


class EventWindows(Dataset[Any]):
    """Windows of recordings, each made into what a model takes.

    Can be handed to a ``DataLoader`` with any number of processes: files are opened where they are read.

    Args:
        windows: W of them.
        transform: makes an item of a window's events; EventGPT's five pictures if None. The events may be
            mapped from disk and are valid only until it returns: what is kept must be copied.
        size: ``(height, width)`` of the sensor where the files do not tell.
        open_files: how many recordings stay open.

    Raises:
        ValueError: ``open_files`` below 1.
    """

    def __init__(
        self,
        windows: Iterable[Window],
        transform: Callable[[EventStream], Any] | None = None,
        size: tuple[int, int] | None = None,
        open_files: int = 8,
    ) -> None:
        if open_files < 1:
            raise ValueError(f"open_files must be at least 1, got {open_files}")
        self.windows = [Window(str(path), int(start), int(end)) for path, start, end in windows]
        self.transform: Callable[[EventStream], Any] = transform or render_eventgpt
        self.size = size
        self._pool = _Files(open_files, size)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> Any:
        """The item of a window.

        Raises:
            IndexError: there is no such window.
            OSError: its file cannot be read.
            ValueError: its file or its events are not valid; names the window.
        """
        window = self.windows[number]
        try:
            with self._pool.borrow(window.path) as file:
                return self.transform(file.read(window.start_us, window.end_us))
        except ValueError as error:
            raise ValueError(f"window {number} {tuple(window)}: {error}") from error


def cut(
    paths: Iterable[str | os.PathLike[str]],
    duration_us: int = 1_000_000,
    step_us: int | None = None,
    size: tuple[int, int] | None = None,
    rest: bool = False,
) -> list[Window]:
    """Cuts recordings into windows of equal length, from the first event on; empty ones are left out.

    Args:
        paths: recordings.
        duration_us: of a window, microseconds. What is left at the end of a recording makes none, and a
            recording of a second mostly has its first and last events a little less than that apart.
        step_us: from one window's start to the next; ``duration_us`` if None.
        size: ``(height, width)`` of the sensor where the files do not tell.
        rest: whether what is left at the end is a window too.

    Raises:
        ValueError: a duration or step below 1, or a file that is not valid.
    """
    duration_us = operator.index(duration_us)
    step_us = duration_us if step_us is None else operator.index(step_us)
    if duration_us < 1 or step_us < 1:
        raise ValueError(f"duration_us and step_us must be at least 1, got {duration_us} and {step_us}")
    windows = []
    for path in paths:
        with open_events(path, size=size) as file:
            # The last event lies inside: a recording of exactly one second is one window of a second.
            stop = file.last_us + (1 if rest else 2 - duration_us)
            for start in range(file.first_us, stop, step_us):
                if file.number_at(start) < file.number_at(start + duration_us):
                    windows.append(Window(str(path), start, start + duration_us))
    return windows


def prefetch(
    samples: Samples[Item], order: Iterable[int] | None = None, ahead: int = 2, workers: int = 1
) -> Iterator[Item]:
    """Items of ``samples``, prepared in threads while the caller computes.

    Equivalent to ``(samples[i] for i in order)``; an error is raised where its item would have come.

    Args:
        samples: what is read.
        order: numbers of the items; all in turn if None.
        ahead: how many items are prepared or waiting at a time, beside the caller's.
        workers: threads; more than one where an item takes longer than what the caller does with it.

    Raises:
        ValueError: ``ahead`` or ``workers`` below 1.
    """
    if ahead < 1 or workers < 1:
        raise ValueError(f"ahead and workers must be at least 1, got {ahead} and {workers}")
    return _prefetched(samples, iter(range(len(samples)) if order is None else order), ahead, workers)


def _prefetched(samples: Samples[Item], order: Iterator[int], ahead: int, workers: int) -> Iterator[Item]:
    waiting: deque[Future[Item]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="specfuse-events")
    try:
        for number in order:
            waiting.append(pool.submit(samples.__getitem__, number))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # A caller who stops early does not wait for what it no longer wants.
        pool.shutdown(wait=False, cancel_futures=True)


class _Files:
    """Recordings that stay open, the latest used ones; each is lent to one thread at a time."""

    def __init__(self, most: int, size: tuple[int, int] | None) -> None:
        self._most, self._size = most, size
        self._fresh()

    def _fresh(self) -> None:
        self._idle: OrderedDict[tuple[str, int], EventFile] = OrderedDict()
        self._lock = threading.Lock()
        self._serial = 0
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"_most": self._most, "_size": self._size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_most"], state["_size"])  # type: ignore[misc]

    @contextmanager
    def borrow(self, path: str) -> Iterator[EventFile]:
        """An open recording that nobody else uses meanwhile."""
        if self._process != os.getpid():
            self._fresh()  # a forked process must not use its parent's files
        file = self._taken(path) or open_events(path, size=self._size)
        try:
            yield file
        finally:
            self._give_back(path, file)

    def _taken(self, path: str) -> EventFile | None:
        with self._lock:
            key = next((key for key in reversed(self._idle) if key[0] == path), None)
            return self._idle.pop(key) if key else None

    def _give_back(self, path: str, file: EventFile) -> None:
        with self._lock:
            self._serial += 1
            self._idle[path, self._serial] = file
            spare = [self._idle.popitem(last=False)[1] for _ in range(len(self._idle) - self._most)]
        for old in spare:
            old.close()
