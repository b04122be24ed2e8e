"""Prophesee's recordings: RAW files in EVT 2.0 and EVT 3.0, and DAT files.

Decoded here and not by a library: the one that reads all three, expelliarmus, has no release since 2023, no
wheel for Python above 3.11 and a licence (GPL 2) that this package's users do not expect.

Source: Prophesee's format descriptions (docs.prophesee.ai: RAW, DAT); a DAT file without
header as in its open reader, OpenEB.
"""

from __future__ import annotations

import copy
import os
import re
from bisect import bisect_left, bisect_right
from typing import Any, NamedTuple

import numpy as np

from specfuse.events.evt import Columns, Dat, Decoder, Evt2, Evt3
from specfuse.events.source import EventFile

CHUNK = 1 << 15  # words decoded at a time; intermediate arrays take some 100 bytes a word
CD_TYPES = (0x00, 0x0C)  # of DAT: generic 2D events, and contrast changes
LONGEST_LINE = 1 << 16  # bytes, of a header
CONTROL = bytes({*range(32), 127} - {*b"\t\r\n"})
TYPES = (np.uint16, np.uint16, np.int64, np.uint8)  # of x, y, t, p


def open_prophesee(path: str, format: str) -> EventFile:
    """Opens a RAW file (``evt2``, ``evt3``) or a DAT file (``dat``).

    The file is decoded once, piece by piece, to learn where its times are; a slice is decoded when it is
    asked for.

    Raises:
        ValueError: another encoding, an empty or a truncated file.
    """
    header, begin = read_header(path)
    if header.get("endianness", "little") != "little":
        raise ValueError(f"{path}: only little-endian recordings are read, got {header['endianness']}")
    if (told := encoding(header)) not in (None, format):
        raise ValueError(f"{path}: its header tells {told}, but format is {format!r}")
    if format == "dat":
        begin = _dat_begin(path, begin)
    decoder: Decoder = {"dat": Dat, "evt2": Evt2, "evt3": Evt3}[format]()
    words = _Words(path, begin, decoder)
    return EventFile(
        path,
        format,
        {name: _Column(words, i) for i, name in enumerate("xytp")},
        _sensor(header),
        take=words.take,
    )


def encoding(header: dict[str, str]) -> str | None:
    """The format that a header tells: evt2, evt3, dat or None. Others come as they are named, ``evt2.1``."""
    told = header.get("evt") or re.sub("(?i)^evt", "", header.get("format", "").split(";")[0])
    if told:
        return {"2.0": "evt2", "2": "evt2", "3.0": "evt3", "3": "evt3"}.get(told, f"evt{told}")
    return "dat" if "data" in header or "version" in header else None


def read_header(path: str) -> tuple[dict[str, str], int]:
    """Keywords, in lower case, and values of the text lines that begin with "%"; and where the data begin."""
    found, begin = {}, 0
    with open(path, "rb") as file:
        while (line := file.readline(LONGEST_LINE)).startswith(b"%"):
            # Data may begin with a "%" too.
            if line != line.translate(None, CONTROL) or len(line) == LONGEST_LINE:
                break
            begin += len(line)
            key, _, value = line[1:].decode("latin-1").strip().partition(" ")
            found[key.lower()] = value.strip()
            if key.lower() == "end":
                break
    return found, begin


def _sensor(header: dict[str, str]) -> tuple[int, int] | None:
    """``(height, width)`` of a header, however it tells them."""
    if size := re.fullmatch(r"(\d+)x(\d+)", header.get("geometry", "")):
        return int(size[2]), int(size[1])
    told = dict(re.findall(r"(width|height)=(\d+)", header.get("format", "")))
    told |= {side: header[side] for side in ("width", "height") if header.get(side, "").isdecimal()}
    return (int(told["height"]), int(told["width"])) if len(told) == 2 else None


def _dat_begin(path: str, begin: int) -> int:
    """Where the events of a DAT file begin, checked to be those of contrast.

    Type and size of the events follow the header. The oldest files have no header, and neither of the two.
    """
    with open(path, "rb") as file:
        file.seek(begin)
        kind = file.read(2)
    if not begin and not kind:
        raise ValueError(f"{path} is empty")
    if not begin:
        return 0
    if len(kind) < 2:
        raise ValueError(f"{path} is truncated: type and size of its events are missing")
    if kind[0] not in CD_TYPES or kind[1] != 8:
        raise ValueError(
            f"{path} does not hold contrast events of 8 bytes: type {kind[0]:#04x}, size {kind[1]}"
        )
    return begin + 2


class _Chunk(NamedTuple):
    """A piece of a file that holds events."""

    before: int  # events in the file before it
    last_us: int
    word: int  # its first
    decoder: Decoder  # as it stands there


class _Words:
    """The events of a file of words, decoded where they are asked for."""

    def __init__(self, path: str, begin: int, decoder: Decoder) -> None:
        self._path, self._begin, self._kind = path, begin, decoder.word
        left, size = os.path.getsize(path) - begin, self._kind.itemsize
        if left % size:
            raise ValueError(f"{path} is truncated: {left} bytes of data are not whole words of {size} bytes")
        self._chunk, self._length = CHUNK, left // size
        self._latest: tuple[int, Columns] = (-1, [])
        self.chunks: list[_Chunk] = []
        self.count, self.largest = 0, [0, 0]
        for word in range(0, self._length, self._chunk):
            before = copy.deepcopy(decoder)
            x, y, t, _ = decoder.decode(self._read(word))
            if len(t):
                self.chunks.append(_Chunk(self.count, int(t[-1]), word, before))
                self.count += len(t)
                self.largest = [max(m, int(c.max())) for m, c in zip(self.largest, (x, y), strict=True)]

    def _read(self, word: int) -> np.ndarray:
        count = min(self._chunk, self._length - word)
        words = np.fromfile(self._path, self._kind, count, offset=self._begin + word * self._kind.itemsize)
        if len(words) < count:
            raise ValueError(f"{self._path} has become shorter since it was opened")
        return words

    def _decoded(self, number: int) -> Columns:
        """The events of a chunk."""
        if self._latest[0] != number:
            chunk = self.chunks[number]
            self._latest = number, copy.deepcopy(chunk.decoder).decode(self._read(chunk.word))
        return self._latest[1]

    def take(self, start: int, stop: int) -> Columns:
        """x, y, t and p of the events number ``start`` to ``stop - 1``."""
        taken = [np.empty(stop - start, kind) for kind in TYPES]
        number = max(bisect_right(self.chunks, start, key=lambda chunk: chunk.before) - 1, 0)
        while number < len(self.chunks) and self.chunks[number].before < stop:
            before, columns = self.chunks[number].before, self._decoded(number)
            first, last = max(start - before, 0), min(stop - before, len(columns[0]))
            for whole, part in zip(taken, columns, strict=True):
                whole[before + first - start : before + last - start] = part[first:last]
            number += 1
        return taken

    def first_at(self, time_us: int) -> int:
        """Number of the first event at or after a time."""
        number = bisect_left(self.chunks, time_us, key=lambda chunk: chunk.last_us)
        if number == len(self.chunks):
            return self.count
        return self.chunks[number].before + bisect_left(self._decoded(number)[2], time_us)


class _Column:
    """x, y, t or p of a recording that is decoded where it is asked for."""

    def __init__(self, words: _Words, which: int) -> None:
        self._words, self._which, self.dtype = words, which, np.dtype(TYPES[which])
        if which < 2:
            self.largest = words.largest[which]
        if which == 2:
            self.first_at = words.first_at

    def __len__(self) -> int:
        return self._words.count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._words.take(start, max(stop, start))[self._which][::step]
        if not -len(self) <= index < len(self):
            raise IndexError(f"event {index} of {len(self)}")
        return self._words.take(index % len(self), index % len(self) + 1)[self._which][0]
