"""Event pictures of clips, drawn once: the same as drawn now, and drawn again where a block is broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from specfuse.data.world import events
from specfuse.events import render_eventgpt
from specfuse.train import event_store
from specfuse.train.event_store import event_pictures, load_event_pictures


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_store, "block_of", lambda number: range(number * 16, number * 16 + 3))


def test_pictures_are_those_of_the_renderer() -> None:
    stream = events(2, 64, event_store.RATE)
    assert np.array_equal(event_pictures(2), np.stack(render_eventgpt(stream, 5)))


@pytest.mark.usefixtures("small_blocks")
def test_blocks_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    first = load_event_pictures([18, 1, 2], tmp_path, done.append)
    assert first.shape == (3, 5, 64, 64, 3) and done == [2, 3]
    for index, pictures in zip((18, 1, 2), first, strict=True):
        assert np.array_equal(pictures, event_pictures(index))
    monkeypatch.setattr(event_store, "event_pictures", lambda index: pytest.fail(f"{index} is drawn again"))
    assert np.array_equal(load_event_pictures([1, 18, 2], tmp_path), first[[1, 0, 2]])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("keep", [0, 200, 5000])
def test_a_broken_block_is_drawn_again(tmp_path: Path, keep: int) -> None:
    wanted = load_event_pictures([1], tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    assert np.array_equal(load_event_pictures([1], tmp_path), wanted)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size > 5000


@pytest.mark.usefixtures("small_blocks")
def test_a_change_of_the_sensor_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_event_pictures([1], tmp_path)
    event_store._version.cache_clear()
    monkeypatch.setattr(event_store, "RATE", 16)
    try:
        load_event_pictures([1], tmp_path)
    finally:
        event_store._version.cache_clear()
    assert len(list(tmp_path.iterdir())) == 2
