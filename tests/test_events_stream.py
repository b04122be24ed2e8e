"""EventStream: what it accepts, what it refuses and how it says so, and pieces of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specfuse.events import EventStream, load


def stream(times: list[int], **columns: object) -> EventStream:
    count = len(times)
    given_ = {"x": np.zeros(count, np.uint16), "y": np.zeros(count, np.uint16), "p": np.ones(count, np.uint8)}
    return EventStream(t=np.array(times, np.int64), width=8, height=6, **(given_ | columns))


def test_columns_get_their_types() -> None:
    events = stream([1, 2, 2], x=[0, 7, 3], y=np.array([5.0, 0.0, 1.0]), p=np.array([True, False, True]))
    assert [c.dtype for c in (events.x, events.y, events.t, events.p)] == [
        np.uint16,
        np.uint16,
        np.int64,
        np.uint8,
    ]
    assert events.x.tolist() == [0, 7, 3] and events.p.tolist() == [1, 0, 1]
    assert len(events) == 3 and events.duration_us == 1
    assert len(stream([])) == 0 and stream([]).duration_us == 0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [0, 8, 0]}, r"x\[1\] is 8, outside the sensor: width is 8"),
        ({"y": [0, 0, 6]}, r"y\[2\] is 6, outside the sensor: height is 6"),
        ({"p": [0, 1, 2]}, r"p\[2\] is 2: polarity must be 0 or 1"),
        ({"p": [0, -1, 1]}, r"p\[0\] is 0 and p\[1\] is -1: polarity must be 0 or 1, or else -1 or 1"),
        ({"x": [0, 70000, 0]}, r"x\[1\] is 70000: must be a whole number that fits uint16"),
        ({"y": [0, 0.5, 0]}, r"y\[1\] is 0.5: must be a whole number that fits uint16"),
        ({"y": [0, float("nan"), 0]}, r"y\[1\] is nan"),
        ({"x": ["a", "b", "c"]}, "x must hold numbers"),
        ({"x": [0, 1]}, r"x must be one-dimensional and as long as t \(3\), got shape \(2,\)"),
        ({"x": np.zeros((3, 1))}, r"got shape \(3, 1\)"),
        ({"t": np.array([5, 7, 6])}, r"t\[2\] = 6 comes after t\[1\] = 7: time must not go back"),
        ({"width": 0}, "width must be 1 to 65536 pixels, got 0"),
        ({"height": 65537}, "height must be 1 to 65536 pixels, got 65537"),
    ],
)
def test_what_is_wrong_is_named(columns: dict[str, object], message: str) -> None:
    good = {"x": [0, 1, 2], "y": [0, 1, 2], "t": np.array([1, 2, 3]), "p": [0, 1, 1], "width": 8, "height": 6}
    EventStream(**good)
    with pytest.raises(ValueError, match=message):
        EventStream(**(good | columns))


@settings(deadline=None)
@given(st.lists(st.integers(0, 50)), st.integers(-5, 55), st.integers(0, 60))
def test_between_is_half_open(times: list[int], start: int, length: int) -> None:
    times.sort()
    piece = stream(times).between(start, start + length)
    assert piece.t.tolist() == [t for t in times if start <= t < start + length]


def test_pieces_by_time_join_without_loss() -> None:
    events = stream(list(range(100)), x=np.arange(100) % 8)
    pieces = [events.between(a, a + 13) for a in range(0, 100, 13)]
    assert np.concatenate([p.x for p in pieces]).tolist() == events.x.tolist()
    assert np.shares_memory(pieces[0].t, events.t)
    with pytest.raises(ValueError, match="stop_us must not be before start_us, got 5 and 4"):
        events.between(5, 4)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 9))
def test_split_gives_the_rest_to_the_last(count: int, parts: int) -> None:
    pieces = stream(list(range(count))).split(parts)
    assert [len(piece) for piece in pieces[:-1]] == [count // parts] * (parts - 1)
    assert np.concatenate([piece.t for piece in pieces]).tolist() == list(range(count))


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 9))
def test_every_leaves_the_rest_to_the_last(count: int, each: int) -> None:
    pieces = stream(list(range(count))).every(each)
    assert [len(piece) for piece in pieces] == [each] * (count // each) + [count % each] * (count % each > 0)
    assert [t for piece in pieces for t in piece.t] == list(range(count))


def test_by_index() -> None:
    events = stream(list(range(10)))
    assert events.by_index(2, 5).t.tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="0 <= start <= stop <= 10, got 3 and 11"):
        events.by_index(3, 11)
    with pytest.raises(ValueError, match="parts must be at least 1, got 0"):
        events.split(0)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        events.every(0)


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int64, np.float32])
def test_signed_polarity_is_read_as_zero_and_one(kind: type) -> None:
    signs = np.array([-1, 1, 1, -1], kind)
    four = np.arange(4)
    events = EventStream(four, four, four, signs, 4, 4)
    assert events.p.dtype == np.uint8 and events.p.tolist() == [0, 1, 1, 0]
    assert EventStream(four, four, four, np.full(4, -1, kind), 4, 4).p.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"p\[2\] is 0.*polarity must be"):
        EventStream(four, four, four, np.array([-1, 1, 0, 1], kind), 4, 4)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.float32])
def test_narrow_columns_of_a_file_without_a_size(kind: type, tmp_path: Path) -> None:
    columns = {"x": np.arange(100) % 34, "y": np.arange(100) % 30, "p": np.arange(100) % 2}
    np.savez(tmp_path / "e.npz", t=np.arange(100), **{k: v.astype(kind) for k, v in columns.items()})
    events = load(tmp_path / "e.npz")
    assert (events.width, events.height) == (34, 30)
    assert events.x.tolist() == columns["x"].tolist()
    highest = 300 if kind is np.float32 else min(np.iinfo(kind).max, 40_000)
    edge = {"x": np.array([highest], kind), "y": np.zeros(1, kind), "p": np.zeros(1)}
    np.savez(tmp_path / "edge.npz", t=np.zeros(1), **edge)
    assert load(tmp_path / "edge.npz").width == highest + 1
