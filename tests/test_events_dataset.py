"""Windows of recordings as a torch dataset, and reading ahead."""

from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from event_cases import noise
from torch.utils.data import DataLoader

from specfuse.events import EventStream, render_eventgpt, save
from specfuse.events.dataset import EventWindows, Window, cut, prefetch


@pytest.fixture
def recording(tmp_path: Path) -> tuple[str, EventStream]:
    path, events = tmp_path / "a.npz", noise(4000, 32, 24, start_us=10**10)
    save(path, events)
    return str(path), events


def times(events: EventStream) -> list[int]:
    return events.t.tolist()


def test_items_are_the_windows_pictures(recording: tuple[str, EventStream]) -> None:
    path, events = recording
    windows = cut([path], duration_us=200_000)
    data = EventWindows(windows)
    assert len(data) == len(windows) >= 4
    for i, (_, start, end) in enumerate(windows):
        expected = render_eventgpt(events.between(start, end))
        assert all(np.array_equal(a, b) for a, b in zip(data[i], expected, strict=True))
    with pytest.raises(IndexError):
        data[len(windows)]


def test_cut_takes_whole_windows_and_leaves_out_empty_ones(tmp_path: Path) -> None:
    t = np.array([5, 6, 14, 35, 44])
    save(tmp_path / "a.npz", EventStream(t % 8, t % 8, t, t % 2, 8, 8))
    found = cut([tmp_path / "a.npz"], duration_us=10)
    assert [w[1:] for w in found] == [(5, 15), (35, 45)], "15 to 35 is empty, the last event is at 44"
    assert [w[1:] for w in cut([tmp_path / "a.npz"], 10, step_us=15)] == [(5, 15), (35, 45)]
    assert cut([tmp_path / "a.npz"], 41) == []
    (whole,) = cut([tmp_path / "a.npz"], 41, rest=True)
    assert whole[1:] == (5, 46) and EventWindows([whole], transform=times)[0] == t.tolist()
    left = [w[1:] for w in cut([tmp_path / "a.npz"], 30, rest=True)]
    assert left == [(5, 35), (35, 65)], "without rest the second is not a window"
    with pytest.raises(ValueError, match="duration_us and step_us must be at least 1, got 0 and 0"):
        cut([], 0)


@pytest.mark.parametrize("suffix", ["npz", "h5"])
def test_data_loaders_in_processes(tmp_path: Path, suffix: str) -> None:
    if suffix == "h5":
        pytest.importorskip("h5py")
    paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for i, path in enumerate(paths):
        save(path, noise(2000, 32, 24, seed=i))
    data = EventWindows(cut(paths, 150_000), transform=times, open_files=1)
    expected = [data[i] for i in range(len(data))]  # the parent has a file open when it forks
    assert list(DataLoader(data, batch_size=None, num_workers=2)) == expected
    copied = pickle.loads(pickle.dumps(data))
    assert [copied[i] for i in range(len(copied))] == expected


def test_files_are_shared_by_threads_without_mixing(tmp_path: Path) -> None:
    paths = []
    for i in range(4):
        paths.append(tmp_path / f"{i}.npz")
        save(paths[-1], noise(3000, 32, 24, seed=i))
    data = EventWindows(cut(paths, 100_000), transform=times, open_files=2)
    order = np.random.default_rng(0).permutation(len(data)).tolist()
    assert list(prefetch(data, order, ahead=8, workers=4)) == [data[i] for i in order]
    assert len(data._pool._idle) <= 2


def test_errors_name_the_window(recording: tuple[str, EventStream]) -> None:
    path, _ = recording
    data = EventWindows([Window(path, 0, 5), Window(path + "x", 0, 5)])
    with pytest.raises(
        ValueError, match=r"window 0 \('.*a\.npz', 0, 5\): .* no events between 0 us and 5 us"
    ):
        data[0]
    with pytest.raises(FileNotFoundError):
        data[1]
    with pytest.raises(ValueError, match="open_files must be at least 1, got 0"):
        EventWindows([], open_files=0)


class Counted:
    """Items, and which of them have been asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 20

    def __getitem__(self, number: int) -> Any:
        self.asked.append(number)
        if number == 13:
            raise KeyError("thirteen")
        return number, threading.current_thread().name


def test_prefetch_keeps_the_order_and_its_bound() -> None:
    samples = Counted()
    found = prefetch(samples, range(10), ahead=3, workers=2)
    assert samples.asked == [], "nothing is read before it is asked for"
    for i in range(10):
        number, thread = next(found)
        assert number == i and thread.startswith("specfuse-events")
        assert len(samples.asked) <= i + 4
    assert next(found, None) is None
    assert [n for n, _ in prefetch(samples, [3, 1, 3])] == [3, 1, 3]
    assert list(prefetch(samples, [])) == []


def test_errors_come_where_their_item_would() -> None:
    found = prefetch(Counted(), ahead=5)
    assert [next(found)[0] for _ in range(13)] == list(range(13))
    with pytest.raises(KeyError, match="thirteen"):
        next(found)


def test_stopping_early_cancels_what_waits() -> None:
    samples = Counted()
    found = prefetch(samples, ahead=4)
    next(found)
    found.close()  # type: ignore[attr-defined]
    time.sleep(0.05)
    assert len(samples.asked) <= 5
    with pytest.raises(ValueError, match="ahead and workers must be at least 1, got 0 and 1"):
        prefetch(samples, ahead=0)


def test_reading_goes_on_while_the_caller_computes() -> None:
    samples = Counted()
    found = prefetch(samples, ahead=3)
    assert next(found)[0] == 0
    patience = time.monotonic() + 60
    while len(samples.asked) < 4 and time.monotonic() < patience:
        time.sleep(0.001)
    assert samples.asked == [0, 1, 2, 3], "the caller has taken the first item alone"
