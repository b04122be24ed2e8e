"""Recordings of event cameras in files: one way to open, read and write all formats."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

from specfuse.events import dsec, npz, pickled, prophesee
from specfuse.events.source import EventFile
from specfuse.events.stream import EventStream

# name -> what it is
FORMATS = {
    "npz": "NumPy archive of x, y, t, p; not compressed it is memory-mapped",
    "hdf5": "DSEC's HDF5",
    "evt2": "Prophesee RAW, EVT 2.0",
    "evt3": "Prophesee RAW, EVT 3.0",
    "dat": "Prophesee DAT",
    "npy": "EventGPT's pickled dictionary, or an array with fields x, y, t, p",
}
SUFFIXES = {".npz": "npz", ".h5": "hdf5", ".hdf5": "hdf5"}  # what can be written


def open_events(
    path: str | os.PathLike[str], format: str | None = None, *, size: tuple[int, int] | None = None
) -> EventFile:
    """Opens a recording for reading slices; to be closed, or used in a ``with`` block.

    Slices are read where they lie, and a slice takes memory for itself alone: of DSEC's HDF5, of an ``.npz``
    that is not compressed and of an ``.npy`` with fields at once, of the others after the file was gone
    through once. EventGPT's pickled ``.npy`` is read whole, into memory.

    Args:
        path: the file.
        format: one of FORMATS; recognised by the first bytes if None.
        size: ``(height, width)`` of the sensor; if None, what the file tells, else DSEC's 480 x 640 for HDF5
            and the largest coordinates for the rest.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the format needs a library that is not installed; names the extra that brings it.
        ValueError: an unknown format, or a file that is not whole and valid in it.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file of events", str(path))
    if not file.is_file():
        raise ValueError(f"{path} is not a file")
    name = str(path)
    format = recognise(name) if format is None else format
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "npz":
        opened = npz.open_npz(name)
    elif format == "hdf5":
        opened = dsec.open_dsec(name)
    elif format == "npy":
        opened = pickled.open_npy(name)
    else:
        opened = prophesee.open_prophesee(name, format)
    return opened if size is None else replace(opened, size=size)


def load(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    start_us: int | None = None,
    end_us: int | None = None,
    size: tuple[int, int] | None = None,
) -> EventStream:
    """Reads a recording, or the slice ``start_us <= t < end_us`` of it, into memory.

    Args:
        path: the file; see FORMATS for what is understood.
        format: one of FORMATS; recognised by the first bytes if None.
        start_us: microseconds, on the file's own clock (DSEC's ``t_offset`` is added); its beginning if None.
        end_us: microseconds, exclusive; its end if None.
        size: ``(height, width)`` of the sensor, see ``open_events``.

    Returns:
        The events, checked: times never decrease, places lie on the sensor, polarities are 0 or 1 (of a file
        with -1 and 1, 0 and 1).

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the format needs a library that is not installed; names the extra that brings it.
        ValueError: what is wrong with the file or its events and where, or no events in the slice.
    """
    with open_events(path, format, size=size) as file:
        events = file.read(start_us, end_us)
        # A mapped file that somebody shortens would take the process down.
        columns = (getattr(events, name) for name in "xytp")
        x, y, t, p = (column if column.flags.owndata else column.copy() for column in columns)
        return EventStream(x, y, t, p, events.width, events.height)


def save(
    path: str | os.PathLike[str], stream: EventStream, format: str | None = None, compress: bool | None = None
) -> None:
    """Writes a stream, so that ``load`` gives it back.

    Args:
        path: the file; replaced when it is complete.
        stream: E events.
        format: ``npz`` or ``hdf5``; by the suffix if None (``.npz``, ``.h5``, ``.hdf5``).
        compress: by default HDF5 is and ``.npz`` is not, so that both can be read in slices.

    Raises:
        ImportError: ``hdf5`` without h5py and hdf5plugin.
        ValueError: a format that is not written.
    """
    suffix = Path(path).suffix.lower()
    format = SUFFIXES.get(suffix) if format is None else format
    if format == "npz":
        npz.write_npz(path, stream, compress=bool(compress))
    elif format == "hdf5":
        dsec.write_dsec(path, stream, compress=compress is not False)
    else:
        given = f"suffix {suffix!r}" if format is None else f"format {format!r}"
        raise ValueError(f"events are written as npz or hdf5 ({', '.join(SUFFIXES)}), got {given}")


def recognise(path: str | os.PathLike[str]) -> str:
    """The format that a file's first bytes tell.

    Raises:
        ValueError: none of FORMATS.
    """
    with open(path, "rb") as file:
        first = file.read(8)
    if first.startswith(b"PK"):
        return "npz"
    if first.startswith(b"\x89HDF"):
        return "hdf5"
    if first.startswith(b"\x93NUMPY"):
        return "npy"
    if first.startswith(b"%"):
        told = prophesee.encoding(prophesee.read_header(str(path))[0])
        if told in FORMATS:
            return told
        what = f"a Prophesee file of encoding {told}" if told else "a Prophesee file that names no encoding"
    else:
        what = "empty" if not first else f"none of these formats (first bytes {first[:4]!r})"
        if first and Path(path).suffix.lower() == ".dat":
            what += ", unless it is a DAT file without a header, which format='dat' reads"
    raise ValueError(f"{path} is {what}; read are {', '.join(FORMATS)}")
