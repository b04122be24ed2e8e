"""EventGPT's pickled .npy: good files are read, hostile ones are named and run nothing."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from event_cases import noise, same, streams
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specfuse.events import load, pickled

HEADER = io.BytesIO()
np.lib.format.write_array_header_1_0(HEADER, {"descr": "|O", "fortran_order": False, "shape": ()})


class Calls:
    """Pickled, it is a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def columns(**changed: Any) -> dict[str, Any]:
    events = noise(20, 8, 6)
    return {"x": events.x, "y": events.y, "t": events.t, "p": events.p} | changed


def write(path: Path, pickle_bytes: bytes) -> Path:
    path.write_bytes(HEADER.getvalue() + pickle_bytes)
    return path


def pickled_array(value: Any, protocol: int = 4) -> bytes:
    holder = np.empty((), object)
    holder[()] = value
    return pickle.dumps(holder, protocol)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(streams(1), st.sampled_from([np.uint16, np.int64, np.float64, ">u2", np.uint32]), st.booleans())
def test_what_eventgpt_wrote(tmp_path: Path, events: Any, kind: Any, strided: bool) -> None:
    held = {"x": events.x.astype(kind), "y": events.y.astype(kind), "t": events.t, "p": events.p == 1}
    if strided:
        held = {name: np.repeat(value, 2)[::2] for name, value in held.items()}
    np.save(tmp_path / "a.npy", held, allow_pickle=True)
    read = load(tmp_path / "a.npy", size=(events.height, events.width))
    assert same(read, events)


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_all_protocols_of_numpy_1_and_2(tmp_path: Path, protocol: int, module: bytes) -> None:
    extra = {"duration": np.int64(5), "scale": np.float32(0.5), "name": "drive", "rate": 2.5, "no": None}
    data = pickled_array(columns(**extra), protocol)
    for written in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        if protocol == 4:
            data = data.replace(
                b"\x8c" + bytes([len(written)]) + written, b"\x8c" + bytes([len(module)]) + module
            )
        else:
            data = data.replace(b"c" + written + b"\n", b"c" + module + b"\n")
    if protocol == 4 and len(data) != len(pickled_array(columns(**extra), 4)):
        data = unframed(data)
    assert same(load(write(tmp_path / "a.npy", data), size=(6, 8)), noise(20, 8, 6))


def unframed(data: bytes) -> bytes:
    """The same pickle without frames, whose lengths a replacement has made wrong."""
    out, at = b"", 0
    while (begin := data.find(b"\x95", at)) >= 0 and begin == 2:
        out, at = out + data[at:begin], begin + 9
    return out + data[at:]


def test_an_array_with_fields(tmp_path: Path) -> None:
    events = noise(20, 8, 6)
    table = np.zeros(20, [("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "u1")])
    for name in "xytp":
        table[name] = getattr(events, name)
    np.save(tmp_path / "a.npy", table)
    assert same(load(tmp_path / "a.npy", size=(6, 8)), events)


# ---------------------------------------------------------------- hostile files


def stack_global(module: str, name: str, arguments: bytes) -> bytes:
    """``module.name(*arguments)`` in protocol 4, dotted names included; ``arguments`` builds a tuple."""
    text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    return b"\x80\x04" + text + b"\x93" + arguments + b"R."


def word_list(*values: Any) -> bytes:
    """The words that put a tuple of plain values on the stack, without beginning and end."""
    return pickle.dumps(values, 3)[2:-1]


TOUCH = "touch {marker}"
HOSTILE: dict[str, Callable[[str], bytes]] = {
    "posix.system": lambda m: pickled_array({"x": Calls(os.system, TOUCH.format(marker=m))}),
    "builtins.eval": lambda m: pickled_array({"x": Calls(eval, f"open({m!r}, 'w')")}),
    "builtins.exec": lambda m: pickled_array(Calls(exec, f"open({m!r}, 'w')"), 3),
    "builtins.getattr": lambda m: pickled_array({"x": Calls(getattr, Calls(__import__, "os"), "system")}),
    "builtins.__import__": lambda m: pickled_array({"x": Calls(__import__, "antigravity")}),
    "io.open": lambda m: pickled_array(Calls(open, m, "w")),
    "numpy.load": lambda m: stack_global("numpy", "load", word_list(m, None, True)),
    "numpy.memmap": lambda m: stack_global("numpy", "memmap", word_list(m, "u1", "w+", 0, 8)),
    "numpy.fromfile": lambda m: stack_global("numpy", "fromfile", word_list(m)),
    "numpy.save": lambda m: stack_global("numpy", "save", word_list(m, 1)),
    "numpy._core.multiarray.fromfile": lambda m: stack_global(
        "numpy._core.multiarray", "fromfile", word_list(m)
    ),
    "numpy.ndarray.tofile": lambda m: stack_global("numpy", "ndarray.tofile", word_list(m)),
    "numpy.dtype.__class__": lambda m: stack_global("numpy", "dtype.__class__", word_list(m)),
    "numpy.ndarray.__init__.__globals__": lambda m: stack_global(
        "numpy", "ndarray.__init__.__globals__", word_list(m)
    ),
    "_codecs.encode": lambda m: stack_global("_codecs", "encode", word_list("abc", "latin1")),
    "subprocess.Popen": lambda m: b"csubprocess\nPopen\n" + word_list(["touch", m]) + b"R.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_and_nothing_runs(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    path = write(tmp_path / "a.npy", HOSTILE[name](str(marker)))
    with pytest.raises(ValueError, match=r"its pickle asks for .*, which is not needed") as caught:
        load(path)
    told = str(caught.value)
    assert name.split(".", 1)[0] in told and name.rsplit(".", 1)[1] in told and str(path) in told
    assert not marker.exists()


def test_the_hostile_file_does_run_elsewhere(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = write(tmp_path / "a.npy", HOSTILE["posix.system"](str(marker)))
    np.load(path, allow_pickle=True)
    assert marker.exists(), "otherwise the test above would pass with any reader"


def reconstruct(kind: bytes, state: bytes) -> bytes:
    """An array made by ``_reconstruct(kind, (0,), b"b")`` and filled with ``state``."""
    return b"\x80\x03cnumpy.core.multiarray\n_reconstruct\n" + kind + b"K\x00\x85C\x01b\x87R" + state + b"b."


NDARRAY, DTYPE = b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"
U1 = DTYPE + b"X\x02\x00\x00\x00u1\x89\x88\x87R"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (reconstruct(DTYPE, word_list(1)), "builds something other than an array"),
        (reconstruct(NDARRAY, b"(K\x01M\x10'\x85" + U1 + b"\x89C\x01at"), "its pickle is damaged"),
        (reconstruct(NDARRAY, b"(K\x01J\xff\xff\xff\xff\x85" + U1 + b"\x89C\x01at"), r"of shape \(-1,\)"),
        (reconstruct(NDARRAY, b"(K\x01K\x01\x85" + U1 + b"\x89]K\x01at"), "neither of plain numbers nor one"),
        (DTYPE + b"X\x02\x00\x00\x00O8\x89\x88\x87RK\x01b.", "asks for a type with parts"),
        (DTYPE + b"X\x03\x00\x00\x00V99\x89\x88\x87R.", "the type 'V99', which is no plain number"),
        (DTYPE + b"X\x05\x00\x00\x00u1,u1\x89\x88\x87R.", "the type 'u1,u1'"),
        (DTYPE + b"X\x04\x00\x00\x00M8us\x89\x88\x87R.", "the type 'M8us'"),
        (NDARRAY + b"K\x01\x85R.", "its pickle is damaged"),
        (NDARRAY + b"}X\x01\x00\x00\x00aK\x01sb.", "its pickle is damaged"),  # attributes of a name
        (b"\x80\x04Ppid\n.", "its pickle uses PERSID"),
        (b"\x80\x04K\x01Q.", "its pickle uses BINPERSID"),
        (b"(S'touch x'\nios\nsystem\n.", "its pickle uses"),
        (b"\x80\x02\x82\x01.", "its pickle uses EXT1"),
        (b"\x80\x04cbuiltins\nobject\n)\x81.", "its pickle uses NEWOBJ"),
        (b"\x80\x04" + b"K\x01" * 20_000 + b".", "longer than 10000 words"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.", "its pickle is damaged"),
        (b"\x80\x04r\xff\xff\xff\x7f.", "its pickle is damaged"),
        (b"", "its pickle is damaged"),
        (b"garbage", "its pickle is damaged"),
        (pickled_array(columns())[:-40], "its pickle is damaged"),
        (pickled_array([1, 2]), "arrays x, y, t and p are needed; x, y, t, p missing"),
        (pickled_array({"x": 1}), "y, t, p missing"),
        (pickled_array(columns(p=[1, 0])), "p is not an array"),
        (pickled_array(columns(p=np.array([None]))), "neither of plain numbers nor one object"),
        (pickled_array(columns(t=np.zeros(3, [("a", "u1")]))), "which is no plain number"),
        (pickled_array(columns(x=np.zeros((4, 5)))), r"npy: x must be one-dimensional, got shape \(4, 5\)"),
        (pickled_array(columns(x=np.zeros(9))), "must be equally long"),
    ],
)
def test_damaged_and_strange_pickles(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "a.npy", data))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_changed_byte_leads_anywhere_else(data: st.DataObject) -> None:
    """Whatever a few wrong bytes make of a good pickle: it is read, or refused with a ValueError."""
    good = bytearray(pickled_array({"x": np.arange(3), "n": np.int64(4)}))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        value = pickled.unpickle(bytes(good))
    except ValueError:
        return
    words = {word.name for word, _, _ in pickletools.genops(bytes(good))}
    assert words <= pickled.OPCODES and not callable(value)


def test_names_keep_nothing_of_a_file() -> None:
    for name in pickled.NAMES.values():
        with pytest.raises(AttributeError):
            name.left_behind = 1  # type: ignore[attr-defined]
