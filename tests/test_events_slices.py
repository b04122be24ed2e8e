"""A slice of a recording is what cutting all of it gives, and takes memory for itself alone."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from event_cases import same, streams
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_events_columns import as_table
from test_events_prophesee import write

from specfuse.events import EventStream, load, npz, open_events, prophesee, save, source

try:
    import h5py
except ImportError:
    h5py = None
needs_h5py = pytest.mark.skipif(h5py is None, reason="needs the extra: pip install 'specfuse[events]'")
RAW = ["evt2", "evt3", "evt3 vectors", "dat"]
FORMATS = [*RAW, "npz", "packed npz", "table", pytest.param("hdf5", marks=needs_h5py)]
FILES = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(folder: Path, kind: str, events: EventStream) -> Path:
    if kind in RAW:
        return write(folder / "a.raw", events, kind)
    if kind == "table":
        as_table(folder / "a.npy", {name: getattr(events, name) for name in "xytp"})
        return folder / "a.npy"
    path = folder / ("a.h5" if kind == "hdf5" else "a.npz")
    save(path, events, compress=kind != "npz")
    return path


@FILES
@pytest.mark.parametrize("kind", FORMATS)
@given(
    streams(1),
    st.sampled_from([1, 700, 300_000, 9_000_000]),
    st.sampled_from([1, 2, 7, 64, 1 << 15]),
    st.integers(-1, 200),
    st.integers(0, 200),
)
def test_a_slice_is_the_whole_cut(
    tmp_path: Path, kind: str, events: EventStream, factor: int, chunk: int, first: int, count: int
) -> None:
    steps = (events.t - events.t[0]) // 50_000
    t = steps * (factor if "evt3" not in kind else min(factor, 300_000))
    order = np.lexsort((events.x, events.p, events.y, t))
    events = EventStream(*(c[order] for c in (events.x, events.y, t, events.p)), events.width, events.height)
    path = written(tmp_path, kind, events)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((prophesee, "CHUNK"), (npz, "BLOCK"), (source, "BLOCK")):
            patch.setattr(module, name, chunk)
        size = (events.height, events.width)
        whole = load(path, size=size)
        assert same(whole, events)
        at = int(whole.t[min(max(first, 0), len(whole) - 1)]) + (first < 0)
        end = at + count * factor // 10 + 1
        inside = whole.between(at, end)
        with open_events(path, size=size) as file:
            if len(inside):
                assert same(file.read(at, end), inside)
            for number in (first % len(whole), len(whole)):
                stop = min(number + count, len(whole))
                assert same(file.by_index(number, stop), whole.by_index(number, stop))
            assert [file.number_at(t) for t in (at - 1, at, end)] == [
                int(np.searchsorted(whole.t, t)) for t in (at - 1, at, end)
            ]
            assert file.columns["t"][-1] == whole.t[-1] and file.columns["x"][0] == whole.x[0]
            assert file.columns["y"][::2].tolist() == whole.y[::2].tolist()


@pytest.mark.parametrize(("kind", "lap"), [("evt2", 34), ("evt3", 24), ("dat", 32)])
@pytest.mark.parametrize("chunk", [1, 3, 1 << 15])
def test_laps_of_the_clock_are_kept_from_piece_to_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lap: int, chunk: int
) -> None:
    monkeypatch.setattr(prophesee, "CHUNK", chunk)
    t = [step * (1 << lap) // 3 + 5 for step in range(10)]
    path = write(tmp_path / "a", EventStream([1] * 10, [0] * 10, t, [1] * 10, 4, 4), kind)
    assert load(path).t.tolist() == t
    for start in range(10):
        assert load(path, start_us=t[start]).t.tolist() == t[start:]
        assert load(path, start_us=t[start], end_us=t[start] + 1).t.tolist() == [t[start]]


COUNT = 1_000_000


@pytest.fixture(scope="module")
def long() -> EventStream:
    t = np.arange(COUNT, dtype=np.int64) // 30
    x, y = np.arange(COUNT) % 640, np.arange(COUNT) % 480
    return EventStream(x, y, t, np.arange(COUNT) % 2, 640, 480)


def write_long(path: Path, kind: str, events: EventStream) -> Path:
    x, y, t, p = (column.astype(np.int64) for column in (events.x, events.y, events.t, events.p))
    if kind == "evt2":
        words = (p << 28 | (t & 63) << 22 | x << 11 | y).astype("<u4")
        marks = np.flatnonzero(np.diff(t >> 6, prepend=-1))
        words = np.insert(words, marks, (8 << 28 | t[marks] >> 6).astype("<u4"))
        head = b"% evt 2.0\n"
    elif kind == "evt3":
        parts = [0x8000 | t >> 12 & 0xFFF, 0x6000 | t & 0xFFF, y, 0x2000 | p << 11 | x]
        words, head = np.stack(parts, 1).astype("<u2").reshape(-1), b"% evt 3.0\n"
    elif kind == "dat":
        words, head = (t | x << 32 | y << 46 | p << 60).astype("<u8"), b"% Version 2\n\x0c\x08"
    else:
        return written(path.parent, kind, events)
    path.write_bytes(head + words.tobytes())
    return path


@pytest.mark.parametrize(
    "kind", ["evt2", "evt3", "dat", "npz", "packed npz", "table", pytest.param("hdf5", marks=needs_h5py)]
)
def test_a_slice_takes_memory_for_itself(tmp_path: Path, kind: str, long: EventStream) -> None:
    path = write_long(tmp_path / "a", kind, long)
    load(path, start_us=1000, end_us=1001)  # modules are imported
    tracemalloc.start()
    try:
        piece = load(path, start_us=10_000, end_us=11_000, size=(480, 640))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    expected = long.between(10_000, 11_000)
    assert all(np.array_equal(getattr(piece, name), getattr(expected, name)) for name in "xytp")
    # 1,000,000 events take 13 MB as columns; a piece of the work takes what CHUNK of words do.
    assert peak < 4e6, f"{peak / 1e6:.1f} MB for a slice of {len(piece)} events"


def test_the_resident_memory_of_a_slice(tmp_path: Path, long: EventStream) -> None:
    pytest.importorskip("resource")
    path = write_long(tmp_path / "a.raw", "evt2", long)
    code = "import resource, sys; from specfuse.events import load; load(sys.argv[1], end_us=1)\n"
    code += "now = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    code += "before = now(); load(sys.argv[1], start_us=1000, end_us=2000); print(now() - before)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < path.stat().st_size


def test_a_file_that_becomes_shorter_is_told(tmp_path: Path, long: EventStream) -> None:
    path = write_long(tmp_path / "a.raw", "evt2", long)
    with open_events(path) as file:
        path.write_bytes(path.read_bytes()[:100_000])
        with pytest.raises(ValueError, match=r"a\.raw has become shorter since it was opened"):
            file.read(30_000, 30_001)


def test_a_damaged_packed_archive_is_told(tmp_path: Path, long: EventStream) -> None:
    save(tmp_path / "a.npz", long, compress=True)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        member = archive.getinfo("t.npy")
    data = bytearray((tmp_path / "a.npz").read_bytes())
    at = member.header_offset + member.compress_size // 2
    data[at : at + 8] = bytes(8)
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"is not a whole \.npz file"):
        load(tmp_path / "a.npz")
