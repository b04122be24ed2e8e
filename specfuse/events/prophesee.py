"""Prophesee's recordings: RAW files in EVT 2.0 and EVT 3.0, and DAT files.

Decoded here and not by a library: the one that reads all three, expelliarmus, has no release since 2023, no
wheel for Python above 3.11 and a licence (GPL 2) that this package's users do not expect.

Source: Prophesee's format descriptions (docs.prophesee.ai: EVT 2.0, EVT 3.0, DAT, RAW); how time wraps and
what holds between TIME_HIGH and TIME_LOW as in its open decoder, OpenEB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from specfuse.events.source import EventFile

CHUNK = 1 << 22  # words decoded at a time; intermediate arrays take some 100 bytes a word
CD_TYPES = (0x00, 0x0C)  # of DAT: generic 2D events, and contrast changes
Columns = list[np.ndarray]  # x, y, t, p


def open_prophesee(path: str, format: str) -> EventFile:
    """Reads a RAW file (``evt2``, ``evt3``) or a DAT file (``dat``) into memory.

    Raises:
        ValueError: another encoding, no header, or a truncated file.
    """
    header, begin = read_header(path)
    if header.get("endianness", "little") != "little":
        raise ValueError(f"{path}: only little-endian recordings are read, got {header['endianness']}")
    if format == "dat":
        columns = _dat(path, begin)
    else:
        words = _records(path, begin, np.dtype("<u4" if format == "evt2" else "<u2"))
        decode = _evt2(words) if format == "evt2" else _evt3(words)
        parts = [[np.empty(0, np.int64) for _ in range(4)], *decode]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return EventFile(path, format, dict(zip("xytp", columns, strict=True)), _sensor(header))


def encoding(header: dict[str, str]) -> str | None:
    """The format that a header tells: evt2, evt3, dat or None. Others come as they are named, ``evt2.1``."""
    told = header.get("evt") or re.sub("(?i)^evt", "", header.get("format", "").split(";")[0])
    if told:
        return {"2.0": "evt2", "2": "evt2", "3.0": "evt3", "3": "evt3"}.get(told, f"evt{told}")
    return "dat" if "data" in header or "version" in header else None


def read_header(path: str) -> tuple[dict[str, str], int]:
    """Keywords, in lower case, and values of the lines that begin with "% "; and where the data begin."""
    found, begin = {}, 0
    with open(path, "rb") as file:
        while (line := file.readline(4096)).startswith(b"% "):
            begin += len(line)
            key, _, value = line[1:].decode("latin-1").strip().partition(" ")
            found[key.lower()] = value.strip()
            if key == "end":
                break
    return found, begin


def _sensor(header: dict[str, str]) -> tuple[int, int] | None:
    """``(height, width)`` of a header, however it tells them."""
    if size := re.fullmatch(r"(\d+)x(\d+)", header.get("geometry", "")):
        return int(size[2]), int(size[1])
    told = dict(re.findall(r"(width|height)=(\d+)", header.get("format", "")))
    told |= {side: header[side] for side in ("width", "height") if header.get(side, "").isdigit()}
    return (int(told["height"]), int(told["width"])) if len(told) == 2 else None


def _records(path: str, begin: int, kind: np.dtype) -> np.ndarray:
    """Everything after the header, mapped into memory."""
    with open(path, "rb") as file:
        left = file.seek(0, 2) - begin
    if left % kind.itemsize:
        raise ValueError(
            f"{path} is truncated: {left} bytes of data are not whole words of {kind.itemsize} bytes"
        )
    return np.memmap(path, kind, "r", begin, (left // kind.itemsize,)) if left else np.empty(0, kind)


def _dat(path: str, begin: int) -> Columns:
    """Words of 64 bits: 32 of time, 14 of x, 14 of y, 4 of polarity."""
    with open(path, "rb") as file:
        file.seek(begin)
        kind = file.read(2)
    if len(kind) < 2:
        raise ValueError(f"{path} is truncated: type and size of its events are missing")
    if kind[0] not in CD_TYPES or kind[1] != 8:
        raise ValueError(
            f"{path} does not hold contrast events of 8 bytes: type {kind[0]:#04x}, size {kind[1]}"
        )
    words = _records(path, begin + 2, np.dtype([("t", "<u4"), ("place", "<u4")]))
    place, t = words["place"], words["t"].astype(np.int64)
    # The clock of 32 bits starts again after 71 minutes.
    t[1:] += np.cumsum(np.diff(t) < -(2**31)) << 32
    return [place & 0x3FFF, place >> 14 & 0x3FFF, t, place >> 28]


def _evt2(words: np.ndarray) -> Iterator[Columns]:
    """Words of 32 bits: 4 of type; then 6 of time, 11 of x, 11 of y, or 28 of time's upper part."""
    clock = _Clock(bits=28)
    for start in range(0, len(words), CHUNK):
        part = np.asarray(words[start : start + CHUNK])
        kind = part >> 28
        high, known, _ = clock.follow(kind == 0x8, part & 0xFFFFFFF)
        events = (kind <= 1) & known
        part = part[events]
        t = high[events] << 6 | (part >> 22 & 0x3F)
        yield [part >> 11 & 0x7FF, part & 0x7FF, t, part >> 28]


def _evt3(words: np.ndarray) -> Iterator[Columns]:
    """Words of 16 bits: 4 of type, 12 of content; what a word does not say holds from words before."""
    decoder = _Evt3()
    for start in range(0, len(words), CHUNK):
        yield decoder.decode(np.asarray(words[start : start + CHUNK]))


@dataclass
class _Clock:
    """The upper part of the time, which words of their own tell and which wraps."""

    bits: int
    last: int | None = None  # with the laps

    def follow(self, mark: np.ndarray, content: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Upper time at every word, whether it is known there yet, and which words change it."""
        told = content[mark].astype(np.int64)
        first = self.last is None
        before = int(told[0]) if first and len(told) else self.last or 0
        lap = 1 << self.bits
        chain = np.concatenate([[before], told])
        back = chain[:-1] % lap - told >= lap // 2
        told += (before // lap + np.cumsum(back)) * lap
        high = _held(mark, told, before)
        changed = np.zeros(len(mark), bool)
        changed[mark] = np.diff(np.concatenate([[-1 if first else before], told])) != 0
        known = np.cumsum(mark) > 0 if first else np.ones(len(mark), bool)
        if len(told):
            self.last = int(told[-1])
        return high, known, changed


@dataclass
class _Evt3:
    """What holds from one chunk of words to the next."""

    clock: _Clock = field(default_factory=lambda: _Clock(bits=12))
    low: int = 0
    y: int = 0
    base: int = 0  # column of the next vector's first pixel
    polarity: int = 0  # of vectors

    def decode(self, words: np.ndarray) -> Columns:
        """Events of a chunk of uint16 words."""
        kind, content = words >> 12, words & 0xFFF
        high, known, changed = self.clock.follow(kind == 0x8, content)
        # A new upper time comes before its lower one: until then the lower one is nought.
        low_told = (kind == 0x6) | changed
        low = _held(low_told, np.where(kind == 0x6, content, 0)[low_told], self.low)
        row = kind == 0x0
        y = _held(row, content[row] & 0x7FF, self.y)
        base, polarity, end = self._vectors(kind, content)
        single = np.flatnonzero((kind == 0x2) & known)
        vector = np.flatnonzero(((kind == 0x4) | (kind == 0x5)) & known)
        valid = np.where(kind[vector] == 0x4, content[vector], content[vector] & 0xFF)
        which, bit = np.nonzero(valid[:, None] >> np.arange(12, dtype=np.uint16) & 1)
        x = np.concatenate([content[single] & 0x7FF, base[vector][which] + bit])
        p = np.concatenate([content[single] >> 11, polarity[vector][which]])
        at = np.concatenate([single, vector[which]])
        order = np.argsort(at, kind="stable")
        at = at[order]
        if len(words):
            self.low, self.y, self.base, self.polarity = int(low[-1]), int(y[-1]), end, int(polarity[-1])
        return [x[order], y[at], high[at] << 12 | low[at], p[order]]

    def _vectors(self, kind: np.ndarray, content: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Column of every vector's first pixel, its polarity, and the column that follows the chunk."""
        based = kind == 0x3
        steps = np.where(kind == 0x4, 12, 0) + np.where(kind == 0x5, 8, 0)
        before = np.cumsum(steps) - steps
        base = _held(based, (content[based] & 0x7FF) - before[based], self.base) + before
        polarity = _held(based, content[based] >> 11, self.polarity)
        return base, polarity, int(base[-1] + steps[-1]) if len(base) else self.base


def _held(mark: np.ndarray, told: np.ndarray, initial: int) -> np.ndarray:
    """``[N]`` int64: at every word the value of the last marked one up to it, or ``initial``."""
    return np.concatenate([[initial], told.astype(np.int64)])[np.cumsum(mark)]
