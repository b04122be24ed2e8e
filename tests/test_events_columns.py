"""Columns as other libraries write them: narrow, signed, unsigned and floating numbers, polarity -1 and 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from event_cases import noise, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specfuse.events import (
    EventFile,
    EventStream,
    EventTensors,
    counts,
    load,
    open_events,
    render_eventgpt,
    save,
    simulate,
    time_surface,
    voxel_grid,
)
from specfuse.events.dataset import cut

try:
    import h5py
except ImportError:
    h5py = None
FILES = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
KINDS = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">i2", ">u4", ">f8"]


def as_npz(path: Path, columns: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **columns)


def as_packed(path: Path, columns: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **columns)


def as_pickle(path: Path, columns: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.save(file, columns, allow_pickle=True)


def as_table(path: Path, columns: dict[str, np.ndarray]) -> None:
    table = np.zeros(len(columns["t"]), [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        table[name] = column
    with path.open("wb") as file:
        np.save(file, table)


def as_dsec(path: Path, columns: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file[f"events/{name}"] = column


needs_h5py = pytest.mark.skipif(h5py is None, reason="needs the extra: pip install 'specfuse[events]'")
WRITERS = [as_npz, as_packed, as_pickle, as_table, pytest.param(as_dsec, marks=needs_h5py)]
Writer = Callable[[Path, dict[str, np.ndarray]], None]


@st.composite
def columns(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], EventStream]:
    """Events in any types that hold them, and what they are."""
    count = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    x, y, p = rng.integers(0, 128, count), rng.integers(0, 100, count), rng.integers(0, 2, count)
    t = np.sort(rng.integers(0, 128, count))
    kinds = {name: draw(st.sampled_from(KINDS)) for name in "xytp"}
    signed = draw(st.booleans()) and np.dtype(kinds["p"]).kind in "if"
    held = {"x": x, "y": y, "t": t, "p": p * 2 - 1 if signed else p}
    given_ = {name: column.astype(kinds[name]) for name, column in held.items()}
    if draw(st.booleans()) and not signed:
        given_["p"] = p.astype(bool)
    return given_, EventStream(x, y, t, p, 128, 100)


@FILES
@pytest.mark.parametrize("write", WRITERS)
@given(columns(), st.integers(-5, 130), st.integers(0, 140))
def test_types_change_nothing(
    tmp_path: Path, write: Writer, case: tuple[dict[str, np.ndarray], EventStream], start: int, length: int
) -> None:
    given_, events = case
    write(tmp_path / "a", given_)
    assert same(load(tmp_path / "a", size=(100, 128)), events)
    if write is not as_dsec:
        found = load(tmp_path / "a")
        assert (found.width, found.height) == (int(events.x.max()) + 1, int(events.y.max()) + 1)
    inside = events.between(start, start + length)
    if len(inside):
        assert same(load(tmp_path / "a", start_us=start, end_us=start + length, size=(100, 128)), inside)
    else:
        with pytest.raises(ValueError, match="no events between"):
            load(tmp_path / "a", start_us=start, end_us=start + length)


@FILES
@given(columns())
def test_types_change_nothing_in_a_stream(case: tuple[dict[str, np.ndarray], EventStream]) -> None:
    given_, events = case
    for side in (int, np.uint8, np.int16, np.float64):
        made = EventStream(**given_, width=side(128), height=side(100))
        assert same(made, events) and type(made.width) is int
    assert np.array_equal(counts(made), counts(events))
    for ours, theirs in zip(render_eventgpt(made), render_eventgpt(events), strict=True):
        assert np.array_equal(ours, theirs)
    assert np.array_equal(voxel_grid(made, 3), voxel_grid(events, 3))


LARGEST = [("i2", 32767), ("u1", 255), ("i1", 127), ("u2", 65535)]


@pytest.mark.parametrize(("kind", "most"), LARGEST)
@pytest.mark.parametrize("write", WRITERS[:4])
def test_the_largest_of_a_type_makes_a_size(tmp_path: Path, write: Writer, kind: str, most: int) -> None:
    edge = np.array([0, most], kind)
    write(tmp_path / "a", {"x": edge, "y": edge, "t": np.arange(2), "p": np.arange(2)})
    with open_events(tmp_path / "a") as file:
        assert file.sensor == (most + 1, most + 1) and file.read().x.tolist() == [0, most]


# ---------------------------------------------------------------- polarity

POLARITIES = {
    "int8": np.array([-1, 1, -1, 1], np.int8),
    "float": np.array([-1.0, 1.0, -1.0, 1.0]),
    "half": np.array([-1, 1, -1, 1], np.float16),
    "big": np.array([-1, 1, -1, 1], ">i4"),
    "bool": np.array([False, True, False, True]),
    "uint8": np.array([0, 1, 0, 1], np.uint8),
}


@pytest.mark.parametrize("name", POLARITIES)
@pytest.mark.parametrize("write", WRITERS)
def test_polarity_is_read_as_0_and_1(tmp_path: Path, write: Writer, name: str) -> None:
    p, t = POLARITIES[name], np.arange(4) * 10
    write(tmp_path / "a", {"x": np.arange(4), "y": np.arange(4), "t": t, "p": p})
    events = load(tmp_path / "a")
    assert events.p.tolist() == [0, 1, 0, 1] and events.p.dtype == np.uint8
    assert load(tmp_path / "a", start_us=20, end_us=30).p.tolist() == [0], "a slice of OFF events alone"
    assert EventTensors.of(events).p.tolist() == [0, 1, 0, 1]
    save(tmp_path / "b.npz", events)
    assert load(tmp_path / "b.npz").p.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (
            np.array([-1, 0, 1], np.int8),
            r"p\[1\] is 0 and p\[0\] is -1: polarity must be 0 or 1, or else -1 or",
        ),
        ([1, 0, -1], r"p\[1\] is 0 and p\[2\] is -1: polarity must be"),
        ([0, 1, 2], r"p\[2\] is 2: polarity must be 0 or 1"),
        (np.array([1, 255, 1], np.uint8), r"p\[1\] is 255: polarity must be"),
        ([1, -2, 1], r"p\[1\] is -2: polarity must be"),
        ([0.0, 0.5, 1.0], r"p\[1\] is 0.5: polarity must be"),
        ([1.0, float("nan"), 1.0], r"p\[1\] is nan: polarity must be"),
        ([-1.0, float("inf"), 1.0], r"p\[1\] is inf: polarity must be"),
    ],
)
def test_other_polarities_are_refused(tmp_path: Path, p: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EventStream(np.zeros(3, int), np.zeros(3, int), np.arange(3), p, 1, 1)
    for write in (as_npz, as_pickle):
        write(tmp_path / "a", {"x": np.zeros(3), "y": np.zeros(3), "t": np.arange(3), "p": np.array(p)})
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "a")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.array([0, -1, 2], np.int8)}, r"x\[1\] is -1: must be a whole number that fits uint16"),
        ({"y": np.array([0, -300, 2], np.int16)}, r"y\[1\] is -300: must be"),
        ({"x": np.array([0, np.inf, 2], np.float16)}, r"x\[1\] is inf: must be"),
        ({"y": np.array([0, 0.5, 2], np.float16)}, r"y\[1\] is 0.5: must be"),
        ({"x": np.array([0, 2**63, 2], np.uint64)}, r"x\[1\] is 9223372036854775808: must be"),
        ({"t": np.array([0.0, 1.0, 2.0**63])}, r"t\[2\] is 9\.2\d*e\+18: must be"),
        ({"t": np.array([np.nan, 1.0, 2.0])}, r"t\[0\] is nan: must be"),
        ({"t": np.array([3, 2, 1], np.uint16)}, r"t\[1\] = 2 comes after t\[0\] = 3: time must not go back"),
        ({"t": np.array([1, 2, 3], "m8[us]")}, "t must hold numbers"),
    ],
)
def test_values_that_do_not_fit_are_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    good = {"x": np.arange(3), "y": np.arange(3), "t": np.arange(3), "p": np.array([0, 1, 1])}
    as_npz(tmp_path / "a", good | changed)
    with pytest.raises(ValueError, match=message):
        EventStream(**(good | changed), width=9, height=9)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a")


def test_seconds_are_asked_about_where_a_slice_is_wanted(tmp_path: Path) -> None:
    seconds = np.array([0.25, 0.5, 0.75])
    as_npz(tmp_path / "a", {"x": np.arange(3), "y": np.arange(3), "t": seconds, "p": np.array([0, 1, 1])})
    with pytest.raises(ValueError, match=r"t\[0\] is 0.25: .*are these seconds\?"):
        load(tmp_path / "a", start_us=250_000)


@pytest.mark.parametrize(
    ("width", "told"), [(4.5, "4.5"), (float("nan"), "nan"), ("4", "'4'"), (None, "None")]
)
def test_sizes_must_be_whole(width: Any, told: str) -> None:
    with pytest.raises(ValueError, match=rf"width must be a whole number of pixels, got {told}"):
        EventStream([0], [0], [0], [0], width, 4)
    with pytest.raises(ValueError, match=rf"width must be a whole number of pixels, got {told}"):
        EventFile("a", "npz", {name: np.zeros(1, np.uint8) for name in "xytp"}, (4, width))


def test_numbers_of_numpy_as_arguments(tmp_path: Path) -> None:
    events = noise(5000, 640, 480, start_us=40_000)
    t0, t1 = np.int32(events.t[0]), np.int32(events.t[-1])
    assert np.array_equal(voxel_grid(events, np.uint8(255), t0, t1), voxel_grid(events, 255))
    early, late = np.int16(-30_000), np.int64(2_000_000)
    assert np.array_equal(voxel_grid(events, 5, early, late), voxel_grid(events, 5, -30_000, 2_000_000))
    assert np.array_equal(time_surface(events, 1e5, np.uint64(late)), time_surface(events, 1e5, int(late)))
    narrow, plain = (
        render_eventgpt(events, 3, size) for size in ((np.int16(480), np.int16(640)), (480, 640))
    )
    assert all(np.array_equal(a, b) for a, b in zip(narrow, plain, strict=True))
    assert [len(p) for p in events.split(np.uint8(7))] == [len(p) for p in events.split(7)]
    assert len(events.every(np.uint8(200))) == 25
    assert same(events.between(np.uint64(50_000), np.uint64(90_000)), events.between(50_000, 90_000))
    assert len(events.between(-(2**70), 2**70)) == len(events)
    save(tmp_path / "a.npz", events)
    step = np.uint16(50_000)
    assert cut([tmp_path / "a.npz"], step) == cut([tmp_path / "a.npz"], 50_000)


def test_pictures_of_any_type_make_the_same_events() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 128, (6, 8, 8))
    expected = simulate(pictures.astype(np.float64), np.arange(6) * 10_000.0)
    for kind in ("u1", "i1", "u2", "i8", "f2", "f4"):
        for times in ("u2", "i4", "f4"):
            assert same(simulate(pictures.astype(kind), (np.arange(6) * 10_000).astype(times)), expected)
    with pytest.raises(ValueError, match=r"times_us\[5\] is inf: must be a number of microseconds"):
        simulate(pictures, [0, 1, 2, 3, 4, np.inf])


@needs_h5py
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("t_offset", 0.5, "t_offset must be one whole number, got 0.5"),
        ("t_offset", np.nan, "t_offset must be one whole number, got nan"),
        ("t_offset", [1, 2], "t_offset must be one whole number"),
        ("ms_to_idx", [0.0, 1.0], "ms_to_idx must hold whole numbers, got float64"),
    ],
)
def test_numbers_beside_dsecs_events_must_be_whole(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    as_dsec(tmp_path / "a.h5", {name: np.arange(2) for name in "xytp"})
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file[name] = value
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.h5", start_us=1)


@needs_h5py
def test_narrow_times_of_dsec_with_an_offset(tmp_path: Path) -> None:
    for kind in ("u1", "i2", "u4", "u8"):
        as_dsec(tmp_path / "a.h5", {name: np.array([0, 1], kind) for name in "xytp"})
        with h5py.File(tmp_path / "a.h5", "a") as file:
            file["t_offset"], file["ms_to_idx"] = np.int64(51_837_449_776), np.array([0], kind)
        assert load(tmp_path / "a.h5").t.tolist() == [51_837_449_776, 51_837_449_777]
        assert load(tmp_path / "a.h5", start_us=51_837_449_777).t.tolist() == [51_837_449_777]
