"""Events in ``.npz``: arrays x, y, t, p and, where known, width and height.

What ``numpy.savez`` wrote is not compressed: such arrays are mapped into memory and read where they are used.
Compressed ones are unpacked piece by piece, and what is not asked for is dropped.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from specfuse.events.source import EventFile
from specfuse.events.stream import EventStream

ALIGNMENT = 64  # bytes; torch and vector instructions like it
BLOCK = 1 << 16  # numbers unpacked at a time
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, RuntimeError)
PADDING = 0xD935  # id of the extra field that Android's zipalign pads archives with


def open_npz(path: str) -> EventFile:
    """Opens a file of ``write_npz`` or ``numpy.savez``.

    Raises:
        ValueError: not such a file, a broken one, or one without x, y, t, p.
    """
    try:
        columns = _members(path, {"x", "y", "t", "p", "width", "height"})
    except BROKEN as error:
        raise ValueError(f"{path} is not a whole .npz file (truncated?): {error}") from None
    missing = [name for name in "xytp" if name not in columns]
    if missing:
        raise ValueError(f"{path} must hold arrays x, y, t and p; {', '.join(missing)} missing")
    size = None
    if {"width", "height"} <= columns.keys():
        if any(
            columns[name].shape != () or columns[name].dtype.kind not in "iu" for name in ("width", "height")
        ):
            raise ValueError(f"{path}: width and height must each be one whole number")
        size = int(columns["height"]), int(columns["width"])
    return EventFile(path, "npz", {name: columns[name] for name in "xytp"}, size)


def write_npz(path: str | os.PathLike[str], stream: EventStream, compress: bool = False) -> None:
    """Writes x, y, t, p, width and height; readable with ``numpy.load``.

    Args:
        path: of the file; replaced when it is complete.
        stream: E events.
        compress: a third of the size, but then a slice cannot be read without going through all before it.
    """
    columns = {"x": stream.x, "y": stream.y, "t": stream.t, "p": stream.p}
    columns |= {"width": np.array(stream.width), "height": np.array(stream.height)}
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
            for name, values in columns.items():
                member = zipfile.ZipInfo(f"{name}.npy")
                member.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
                # In front of the data: 30 bytes and the name, 20 for sizes above 4 GiB, then the padding.
                empty = -(file.tell() + 30 + len(member.filename) + 20 + 4) % ALIGNMENT
                member.extra = struct.pack("<HH", PADDING, empty) + bytes(empty)
                with archive.open(member, "w", force_zip64=True) as out:
                    np.lib.format.write_array(out, values, allow_pickle=False)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _members(path: str, wanted: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name not in wanted or name == member.filename:
                continue
            try:
                if member.compress_type == zipfile.ZIP_STORED:
                    found[name] = _mapped(path, file, member)
                else:
                    with archive.open(member) as stream:
                        shape, _, dtype = check_bytes(stream, member.file_size)
                    packed = _Packed(path, member.filename, shape[0] if shape else 1, dtype)
                    if len(shape) == 1:
                        found[name] = packed
                    else:
                        with archive.open(member) as stream:
                            found[name] = np.lib.format.read_array(stream, allow_pickle=False)
            except ValueError as error:
                raise ValueError(f"{path}: {name} is no readable array: {error}") from None
    return found


def _mapped(path: str, file: IO[bytes], member: zipfile.ZipInfo) -> np.ndarray:
    """An array stored as it is inside an archive, mapped read-only."""
    file.seek(member.header_offset)
    header = file.read(30)
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    begin = member.header_offset + 30 + name_bytes + extra_bytes
    file.seek(begin)
    shape, fortran, dtype = check_bytes(file, member.file_size)
    offset, count = file.tell(), math.prod(shape)
    if not count or not shape:
        return np.frombuffer(file.read(count * dtype.itemsize), dtype).reshape(shape)
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


class _Packed:
    """An array of ``[E]`` in an archive, unpacked when it is asked for; what is not asked for is dropped."""

    def __init__(self, path: str, member: str, length: int, dtype: np.dtype) -> None:
        self._path, self._member, self._length, self.dtype = path, member, length, dtype
        self.shape, self.ndim = (length,), 1

    def __len__(self) -> int:
        return self._length

    def blocks(self) -> Iterator[np.ndarray]:
        """The array in pieces, in turn."""
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(self._member) as stream:
                read_header(stream)
                left = self._length
                while left:
                    count = min(left, BLOCK)
                    data = stream.read(count * self.dtype.itemsize)
                    if len(data) < count * self.dtype.itemsize:
                        raise EOFError(f"{self._member} ends early")
                    left -= count
                    yield np.frombuffer(data, self.dtype)
                stream.read(1)  # the check of all that was read comes at the end
        except BROKEN as error:
            raise ValueError(f"{self._path} is not a whole .npz file (truncated?): {error}") from None

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            number = range(self._length)[index]
            return self[number : number + 1][0]
        start, stop, step = index.indices(self._length)
        taken = np.empty(max(stop - start, 0), self.dtype)
        begin = 0
        for block in self.blocks():
            first, last = max(start - begin, 0), min(stop - begin, len(block))
            if first < last:
                taken[begin + first - start : begin + last - start] = block[first:last]
            begin += len(block)
            if self._length > begin >= stop:  # the last block's end checks all of them
                break
        return taken[::step]

    def first_at(self, time: float) -> int:
        """Number of the first of rising values at or after ``time``."""
        begin = 0
        for block in self.blocks():
            if block[-1].item() >= time:
                return begin + bisect_left(block, time, key=lambda value: value.item())
            begin += len(block)
        return begin


def check_bytes(file: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """The header, as :func:`read_header`, of a file's next ``size`` bytes if they are what it announces.

    NumPy takes the memory that a header asks for before it looks how much data there is.

    Raises:
        ValueError: Python objects, or another number of bytes.
    """
    begin = file.tell()
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("Python objects are not read")
    count = math.prod(shape)
    if file.tell() - begin + count * dtype.itemsize != size:
        raise ValueError(f"truncated: {count} of {dtype} do not fit its {size} bytes")
    return shape, fortran, dtype


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of the ``.npy`` data that follow in an open file.

    Raises:
        ValueError: not the beginning of a ``.npy`` file.
    """
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format is not known")
    return readers[version](file)
