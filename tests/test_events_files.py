"""Recordings in .npz and DSEC's HDF5: round trips, slices, and what broken files are told."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from event_cases import noise, same, streams
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specfuse.events import EventStream, load, open_events, save
from specfuse.events.files import recognise

try:
    import h5py
    import hdf5plugin
except ImportError:
    h5py = None
needs_h5py = pytest.mark.skipif(h5py is None, reason="needs the extra: pip install 'specfuse[events]'")
WRITTEN = ["npz", pytest.param("h5", marks=needs_h5py)]
SLOW = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def sliced(events: EventStream, start: int | None, end: int | None) -> list[int]:
    return [t for t in events.t.tolist() if (start is None or t >= start) and (end is None or t < end)]


@SLOW
@pytest.mark.parametrize("suffix", WRITTEN)
@given(streams(), st.booleans())
def test_round_trips(tmp_path: Path, suffix: str, events: EventStream, compress: bool) -> None:
    path = tmp_path / f"events.{suffix}"
    save(path, events, compress=compress)
    assert same(load(path), events)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@SLOW
@pytest.mark.parametrize("suffix", WRITTEN)
@given(streams(1), st.integers(-3000, 1_003_000), st.integers(0, 400_000))
def test_slices_are_half_open(tmp_path: Path, suffix: str, events: EventStream, at: int, length: int) -> None:
    path = tmp_path / f"events.{suffix}"
    save(path, events)
    start, end = int(events.t[0]) + at, int(events.t[0]) + at + length
    for a, b in ((start, end), (start, None), (None, end)):
        expected = sliced(events, a, b)
        if expected:
            assert load(path, start_us=a, end_us=b).t.tolist() == expected
        else:
            with pytest.raises(ValueError, match=r"no events between .*; it holds from -?\d+ to \d+ us"):
                load(path, start_us=a, end_us=b)


@pytest.mark.parametrize("suffix", WRITTEN)
def test_slices_at_the_times_of_events(tmp_path: Path, suffix: str) -> None:
    times = [10**12 + t for t in (0, 0, 999, 1000, 1000, 1001, 2000, 7000)]
    events = EventStream([0] * 8, [0] * 8, times, [1] * 8, 640, 480)
    save(tmp_path / f"e.{suffix}", events)
    with open_events(tmp_path / f"e.{suffix}") as file:
        for start in times:
            for end in times:
                if expected := sliced(events, start, end):
                    assert file.read(start, end).t.tolist() == expected
        assert (file.first_us, file.last_us, len(file)) == (times[0], times[-1], 8)
        with pytest.raises(ValueError, match="end_us must not be before start_us, got 5 and 4"):
            file.read(5, 4)


def test_npz_is_mapped_and_a_slice_reads_no_more(tmp_path: Path) -> None:
    events = noise(1000, 64, 48)
    save(tmp_path / "a.npz", events)
    with open_events(tmp_path / "a.npz") as file:
        piece = file.read(100_000, 200_000)
        for name in "xytp":
            column = getattr(piece, name)
            assert np.shares_memory(column, file.columns[name]) and not column.flags.writeable
            assert isinstance(file.columns[name], np.memmap) and file.columns[name].offset % 64 == 0
    assert load(tmp_path / "a.npz").t.flags.writeable, "load does not leave a map behind"
    with np.load(tmp_path / "a.npz") as archive:
        assert np.array_equal(archive["t"], events.t) and int(archive["width"]) == 64


def test_npz_of_others(tmp_path: Path) -> None:
    columns = {"x": [3, 1], "y": [0, 4], "t": np.array([5, 6], np.uint64), "p": np.array([True, False])}
    np.savez(tmp_path / "a.npz", **columns, note=np.array("hello"))
    np.savez_compressed(tmp_path / "b.npz", **columns)
    for name in ("a.npz", "b.npz"):
        events = load(tmp_path / name)
        assert (events.width, events.height) == (4, 5), "the largest coordinates decide"
        assert events.p.tolist() == [1, 0] and events.t.dtype == np.int64
        assert load(tmp_path / name, size=(48, 64)).width == 64
        assert load(tmp_path / name, start_us=6).width == 4, "of the whole file, not of the slice"
    with pytest.raises(
        ValueError, match=r"x\[0\] is 3, outside the sensor: width is 3; size=\(height, width\)"
    ):
        load(tmp_path / "a.npz", size=(5, 3))


def columns_with(**changed: Any) -> dict[str, Any]:
    good = {"x": [0, 1, 2], "y": [0, 1, 2], "t": [1, 2, 3], "p": [0, 1, 1]}
    return {name: np.array(value) for name, value in (good | changed).items() if value is not None}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"t": [1, 3, 2]}, r"t\[2\] = 2 comes after t\[1\] = 3: time must not go back"),
        ({"p": [0, 2, 1]}, r"p\[1\] is 2: polarity must be 0 or 1"),
        ({"p": [0, -1, 1]}, r"p\[1\] is -1"),
        ({"y": None}, "must hold arrays x, y, t and p; y missing"),
        ({"y": [0, 1]}, r"must be equally long, got .*'y': 2"),
        ({"t": [0.1, 0.2, 0.3]}, r"t\[0\] is 0.1: must be a whole number of microseconds"),
        ({"x": ["a", "b", "c"]}, "x must hold numbers, got <U1"),
        ({"x": [0, float("nan"), 1]}, r"x\[1\] is nan: must be a whole number"),
        ({"y": [0, 70_000, 1]}, r"y\[1\] is 70000: must be a whole number that fits uint16"),
        ({"width": 8.5, "height": 3}, "width and height must each be one whole number"),
        ({"x": [0, 1, 9], "width": 8, "height": 3}, r"x\[2\] is 9, outside the sensor: width is 8"),
        ({"x": [[0], [1], [2]]}, r"x must be one-dimensional, got shape \(3, 1\)"),
        ({name: 1 for name in "xytp"}, r"x must be one-dimensional, got shape \(\)"),
        ({"t": np.array([1, 2**63, 2**64 - 1], np.uint64)}, "a time of 18446744073709551615 us does not fit"),
        ({"x": [None, {}, 3]}, "x is no readable array: Python objects are not read"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **columns_with(**changed))
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "a.npz")
    assert str(caught.value).startswith(str(tmp_path / "a.npz"))


def test_errors_in_a_slice_say_where_it_begins(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **columns_with(p=[0, 1, 5]))
    assert len(load(tmp_path / "a.npz", end_us=3)) == 2, "what is not read is not judged"
    with pytest.raises(ValueError, match=r"counted from event 1: p\[1\] is 5"):
        load(tmp_path / "a.npz", start_us=2)


@pytest.mark.parametrize("suffix", WRITTEN)
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    save(path, noise(5000, 64, 48))
    data = path.read_bytes()
    for share in (0.999, 0.5, 0.01):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match=r"is not a whole .* file \(truncated\?\)"):
            load(path)


def test_an_archive_that_lies_about_sizes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **columns_with())
    data = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(data.replace(b"'shape': (3,)", b"'shape': (9,)"))
    with pytest.raises(ValueError, match="x is no readable array: truncated: 9 of int64 do not fit"):
        load(tmp_path / "a.npz")
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<i8", "fortran_order": False, "shape": (10**15,)})
    (tmp_path / "c.npy").write_bytes(huge.getvalue())
    with zipfile.ZipFile(tmp_path / "c.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", huge.getvalue())
    for name in ("c.npy", "c.npz"):
        with pytest.raises(ValueError, match=f"truncated: {10**15} of int64 do not fit"):
            load(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", b"no array")
    with pytest.raises(ValueError, match="x is no readable array"):
        load(tmp_path / "b.npz")


def test_what_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text.npz").write_text("hello, this is text")
    (tmp_path / "newer.raw").write_bytes(b"% evt 2.1\n% end\n12345678")
    for name, message in (
        ("empty", "is empty; read are npz, hdf5"),
        ("text.npz", r"none of these formats \(first bytes b'hell'\)"),
        ("newer.raw", "a Prophesee file of encoding evt2.1"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file of events"):
        load(tmp_path / "nothing.npz")
    with pytest.raises(ValueError, match="is not a file"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"format must be one of npz, .*, got 'aedat'"):
        load(tmp_path / "empty", "aedat")
    with pytest.raises(ValueError, match=r"written as npz or hdf5 .*, got suffix '\.raw'"):
        save(tmp_path / "a.raw", noise(3, 4, 4))


# ---------------------------------------------------------------- DSEC's HDF5


@needs_h5py
def test_dsec_layout(tmp_path: Path) -> None:
    events = noise(3000, 64, 48, start_us=51_837_449_776)
    save(tmp_path / "events.h5", events)
    assert recognise(tmp_path / "events.h5") == "hdf5"
    with h5py.File(tmp_path / "events.h5") as file:
        t, index = file["events/t"][:].astype(np.int64), file["ms_to_idx"][:]
        assert file["events/t"].dtype == np.uint32 and file["events/x"].dtype == np.uint16
        assert file["t_offset"][()] == events.t[0] and t[0] == 0
        assert len(index) == t[-1] // 1000 + 1
        for ms, number in enumerate(index):
            assert t[number] >= 1000 * ms and (number == 0 or t[number - 1] < 1000 * ms)
        assert file["events/x"].compression == "32001" or "32001" in file["events/x"]._filters  # Blosc


@needs_h5py
def test_dsec_of_the_original_has_its_cameras_size(tmp_path: Path) -> None:
    path = tmp_path / "events.h5"
    with h5py.File(path, "w") as file:
        for name, values in columns_with().items():
            file.create_dataset(f"events/{name}", data=values, **hdf5plugin.Blosc())
        file["t_offset"] = np.int64(1000)
    events = load(path)
    assert (events.height, events.width) == (480, 640) and events.t.tolist() == [1001, 1002, 1003]
    assert load(path, start_us=1002).t.tolist() == [1002, 1003], "without ms_to_idx"
    assert load(path, size=(3, 3)).width == 3


@needs_h5py
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.__delitem__("events/p"), "must hold events/p, as DSEC's files do; it holds events"),
        (
            lambda f: f["ms_to_idx"].__setitem__(2, 10**6),
            r"ms_to_idx\[2\] is 1000000, but the file holds 400",
        ),
        (lambda f: f["ms_to_idx"].__setitem__(slice(None), 0), "ms_to_idx is wrong near millisecond 2"),
        (lambda f: f["events/t"].__setitem__(200, 0), r"t\[\d+\] = \d+ comes after"),
        (lambda f: f["events"].move("t", "x2"), "must hold events/t"),
    ],
)
def test_broken_dsec_files(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "events.h5"
    t = np.arange(400) * 100
    save(path, EventStream(t % 64, t % 48, t, t % 2, 64, 48))
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(ValueError, match=message):
        load(path, start_us=2500, end_us=30_000)


@needs_h5py
def test_a_damaged_block_names_the_column(tmp_path: Path) -> None:
    path = tmp_path / "events.h5"
    save(path, noise(5000, 64, 48))
    with h5py.File(path) as file:
        begin = file["events/y"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[begin : begin + 64] = bytes(range(64))
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"/events/y cannot be read"):
        load(path)


def test_without_the_extra_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"pip install 'specfuse\[events\]'"):
        load(tmp_path / "events.h5")
    with pytest.raises(ImportError, match=r"pip install 'specfuse\[events\]'"):
        save(tmp_path / "new.h5", noise(3, 4, 4))


# ---------------------------------------------------------------- real recordings


@pytest.mark.parametrize("name", ["dsec_events_50ms.npz", "dsec_events_interlaken.npz"])
def test_real_recordings(shared_data: Path, tmp_path: Path, name: str) -> None:
    if not (shared_data / name).exists():
        pytest.skip(f"no {name} at {shared_data}")
    events = load(shared_data / name)
    assert (events.height, events.width) == (480, 640)
    middle = (int(events.t[0]) + int(events.t[-1])) // 2
    for suffix in ["npz", "h5"] if h5py else ["npz"]:
        save(tmp_path / f"a.{suffix}", events)
        assert same(load(tmp_path / f"a.{suffix}"), events)
        halves = [
            load(tmp_path / f"a.{suffix}", end_us=middle),
            load(tmp_path / f"a.{suffix}", start_us=middle),
        ]
        assert len(halves[0]) + len(halves[1]) == len(events) and halves[1].t[0] >= middle
