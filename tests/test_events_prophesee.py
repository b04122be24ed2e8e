"""EVT 2.0, EVT 3.0 and DAT: written word by word from the format's description, read back."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from event_cases import same, streams
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specfuse.events import EventStream, load, prophesee

FILES = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
GEOMETRY = {"evt2": "% evt 2.0\n% geometry {w}x{h}\n% end\n", "evt3": "% format EVT3;height={h};width={w}\n"}
DAT = "% Data file containing CD events\n% Version 2\n% Width {w}\n% Height {h}\n"


def evt2_loop(events: EventStream) -> bytes:
    words, high = [], None
    for x, y, t, p in zip(*(c.tolist() for c in (events.x, events.y, events.t, events.p)), strict=True):
        if t >> 6 != high:
            high = t >> 6
            words += [0x8 << 28 | high & 0xFFFFFFF, 0xA << 28 | 5]  # and a trigger, which is not an event
        words.append(p << 28 | (t & 0x3F) << 22 | x << 11 | y)
    return struct.pack(f"<{len(words)}I", *words)


def evt3_loop(events: EventStream, vectors: bool) -> bytes:
    """Runs of events at one time, row and polarity, with rising columns, become vectors if wanted."""
    words, state = [], {"high": None, "low": None, "y": None}
    columns = list(zip(*(c.tolist() for c in (events.x, events.y, events.t, events.p)), strict=True))
    i = 0
    while i < len(columns):
        x, y, t, p = columns[i]
        now = {"high": t >> 12, "low": t & 0xFFF, "y": y}
        if state["high"] != now["high"]:
            words.append(0x8 << 12 | now["high"] & 0xFFF)
            state["low"] = 0  # a new upper time sets the lower one to nought
        if state["low"] != now["low"]:
            words.append(0x6 << 12 | now["low"])
        if state["y"] != y:
            words.append(0x0 << 12 | 0x800 | y)  # the bit of the second camera is no part of y
        state = now
        run = [x]
        while vectors and i + len(run) < len(columns):
            nx, ny, nt, np_ = columns[i + len(run)]
            if (ny, nt, np_) != (y, t, p) or nx <= run[-1] or nx - x >= 32:
                break
            run.append(nx)
        if len(run) == 1:
            words.append(0x2 << 12 | p << 11 | x)
        else:
            words.append(0x3 << 12 | p << 11 | x)
            bits = sum(1 << column - x for column in run)
            words += [0x4 << 12 | bits & 0xFFF, 0xE << 12, 0x4 << 12 | bits >> 12 & 0xFFF]
            words.append(0x5 << 12 | 0xF00 | bits >> 24 & 0xFF)  # bits that VECT_8 does not use
        i += len(run)
    return struct.pack(f"<{len(words)}H", *words)


def dat_loop(events: EventStream) -> bytes:
    records = [
        struct.pack("<II", t & 0xFFFFFFFF, p << 28 | y << 14 | x)
        for x, y, t, p in zip(events.x, events.y, events.t.tolist(), events.p.tolist(), strict=True)
        for x, y in [(int(x), int(y))]
    ]
    return bytes([0x0C, 8]) + b"".join(records)


def write(path: Path, events: EventStream, kind: str) -> Path:
    if kind == "dat":
        head, data = DAT, dat_loop(events)
    elif kind == "evt2":
        head, data = GEOMETRY[kind], evt2_loop(events)
    else:
        head, data = GEOMETRY["evt3"], evt3_loop(events, vectors=kind == "evt3 vectors")
    path.write_bytes(head.format(w=events.width, h=events.height).encode() + data)
    return path


def spread(events: EventStream, factor: int, start: int) -> EventStream:
    """The same events at other times, rows sorted at equal times so that vectors occur."""
    t = (events.t - events.t[:1].sum()) // 50_000 * factor + start
    order = np.lexsort((events.x, events.p, events.y, t))
    return EventStream(*(c[order] for c in (events.x, events.y, t, events.p)), events.width, events.height)


@FILES
@pytest.mark.parametrize("kind", ["evt2", "evt3", "evt3 vectors", "dat"])
@given(streams(), st.sampled_from([1, 700, 5_000, 300_000]), st.sampled_from([0, 3, 16_700_000]), st.data())
def test_round_trips(
    tmp_path: Path, kind: str, events: EventStream, factor: int, start: int, data: st.DataObject
) -> None:
    events = spread(events, factor, start)
    path = write(tmp_path / "a.raw", events, kind)
    # EVT 3.0 has 24 bits of time: it begins again after 16.8 seconds, and where it began is not told.
    lap = 2**24 if "evt3" in kind else 2**40
    expected = EventStream(
        events.x, events.y, events.t - start // lap * lap, events.p, events.width, events.height
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prophesee, "CHUNK", data.draw(st.sampled_from([1, 2, 7, 1 << 22])))
        assert same(load(path), expected)
    if len(events):
        middle = int(expected.t[len(events) // 2])
        assert load(path, start_us=middle).t.tolist() == [t for t in expected.t.tolist() if t >= middle]


@pytest.mark.parametrize(("kind", "bits", "word"), [("evt2", 34, 0x40), ("evt3", 24, 0x1000), ("dat", 32, 1)])
def test_clocks_that_begin_again(tmp_path: Path, kind: str, bits: int, word: int) -> None:
    lap = 1 << bits
    t = [lap - 2 * word, lap - word, lap, lap + 1, 2 * lap - 1, 2 * lap + 5]
    if kind != "dat":  # without an event in the half lap between, a step back is not seen as a new lap
        t = sorted([*t, lap + lap // 3, lap + 2 * lap // 3])
    else:
        t.insert(4, lap + lap // 2)
    events = EventStream([1] * len(t), [0] * len(t), t, [1] * len(t), 4, 4)
    assert load(write(tmp_path / "a", events, kind)).t.tolist() == t


def test_events_before_the_first_time_are_left_out(tmp_path: Path) -> None:
    words = [0x2 << 12 | 5, 0x0 << 12 | 3, 0x8 << 12 | 1, 0x2 << 12 | 6]
    (tmp_path / "a.raw").write_bytes(b"% evt 3.0\n" + struct.pack("<4H", *words))
    events = load(tmp_path / "a.raw")
    assert (events.x.tolist(), events.y.tolist(), events.t.tolist()) == ([6], [3], [4096])
    assert (events.width, events.height) == (7, 4), "no geometry in the header"


def test_a_new_upper_time_without_a_lower_one_does_not_go_back(tmp_path: Path) -> None:
    words = [0x8 << 12 | 1, 0x6 << 12 | 4000, 0x2 << 12, 0x8 << 12 | 2, 0x2 << 12, 0x8 << 12 | 2, 0x2 << 12]
    (tmp_path / "a.raw").write_bytes(b"% evt 3.0\n" + struct.pack("<7H", *words))
    assert load(tmp_path / "a.raw").t.tolist() == [8096, 8192, 8192]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"% evt 3.0\n123", "truncated: 3 bytes of data are not whole words of 2 bytes"),
        (b"% evt 2.0\n% end\n12345", "truncated: 5 bytes of data are not whole words of 4 bytes"),
        (b"% Version 2\n\x0c\x08" + bytes(9), "truncated: 9 bytes of data are not whole words of 8"),
        (b"% Version 2\n\x0c", "truncated: type and size of its events are missing"),
        (b"% Version 2\n\x0e\x08" + bytes(8), "does not hold contrast events of 8 bytes: type 0x0e, size 8"),
        (b"% evt 3.0\n% endianness big\n1234", "only little-endian recordings are read, got big"),
        (b"% evt 3.0\n% Width 4\n\x00", "truncated: 1 bytes of data are not whole words of 2 bytes"),
        (b"% Version 2\n% end\n\x00\x10" + bytes(16), "events of 8 bytes: type 0x00, size 16"),
        (b"% Version 2\n", "truncated: type and size of its events are missing"),
        (b"% date today\n1234", "a Prophesee file that names no encoding"),
        (
            b"% Version 2\n% Width 4\n% Height 4\n\x0c\x08" + struct.pack("<II", 0, 2 << 28),
            r"p\[0\] is 2: polarity must be 0 or 1",
        ),
        (b"% evt 2.0\n% geometry 4x4\n" + struct.pack("<2I", 0x8 << 28, 9 << 11), r"x\[0\] is 9, outside"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a")


def test_a_file_of_a_header_alone_holds_no_events(tmp_path: Path) -> None:
    for head in (b"% evt 3.0\n% end\n", b"% evt 2.0\n", b"% Version 2\n\x00\x08"):
        (tmp_path / "a").write_bytes(head)
        assert len(load(tmp_path / "a")) == 0


OLD = struct.pack("<6I", 7, 1 << 28 | 3 << 14 | 5, 9, 2 << 14 | 4, 9, 1 << 28 | 1)


def test_a_dat_file_of_the_oldest_kind_has_no_header(tmp_path: Path) -> None:
    (tmp_path / "old.dat").write_bytes(OLD)
    events = load(tmp_path / "old.dat", "dat")
    assert [getattr(events, name).tolist() for name in "xytp"] == [[5, 4, 1], [3, 2, 0], [7, 9, 9], [1, 0, 1]]
    assert (events.width, events.height) == (6, 4)
    assert load(tmp_path / "old.dat", "dat", start_us=8).t.tolist() == [9, 9]
    with pytest.raises(ValueError, match="a DAT file without a header, which format='dat' reads"):
        load(tmp_path / "old.dat")
    (tmp_path / "old.dat").write_bytes(OLD[:-3])
    with pytest.raises(ValueError, match="truncated: 21 bytes of data are not whole words of 8 bytes"):
        load(tmp_path / "old.dat", "dat")
    (tmp_path / "old.dat").write_bytes(b"")
    with pytest.raises(ValueError, match=r"old\.dat is empty"):
        load(tmp_path / "old.dat", "dat")


@pytest.mark.parametrize("first", [0x0A25, 0x2025, 0x20, 0x0C])
def test_a_time_that_looks_like_a_comment_is_a_time(tmp_path: Path, first: int) -> None:
    (tmp_path / "old.dat").write_bytes(struct.pack("<4I", first, 5, first + 1, 1 << 28 | 6))
    if first == 0x0A25:  # "%" and the end of a line: a header of one empty line, as in Prophesee's reader
        with pytest.raises(ValueError, match="does not hold contrast events of 8 bytes"):
            load(tmp_path / "old.dat", "dat")
    else:
        assert load(tmp_path / "old.dat", "dat").t.tolist() == [first, first + 1]


@pytest.mark.parametrize(
    "head",
    [
        b"% Data file containing CD events\r\n% Width 8\r\n% Height 6\r\n",
        b"%\n%Width 8\n%\tcomment\n% Height 6\n% Version 2\n",
        b"% Version 2\n% Width 8\n% Height 6\n% note " + b"x" * 9000 + b"\n% end\n",
        "% Version 2\n% author Zo\u00eb\n% Width 8\n% Height 6\n% end\n".encode(),
    ],
)
def test_odd_comment_lines_of_dat(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "a.dat").write_bytes(head + b"\x00\x08" + OLD)
    for format in ("dat", None) if b"Version" in head or b"Data" in head else ("dat",):
        events = load(tmp_path / "a.dat", format)
        assert events.t.tolist() == [7, 9, 9] and (events.width, events.height) == (8, 6)


def test_another_encoding_than_the_header_tells_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"% evt 3.0\n% end\n" + bytes(16))
    for format in ("evt2", "dat"):
        with pytest.raises(ValueError, match=f"its header tells evt3, but format is '{format}'"):
            load(tmp_path / "a.raw", format)
