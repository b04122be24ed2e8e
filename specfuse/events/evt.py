"""Decoders of Prophesee's words: EVT 2.0, EVT 3.0 and DAT, chunk by chunk.

Source: Prophesee's format descriptions (docs.prophesee.ai: EVT 2.0, EVT 3.0, DAT); how time wraps and what
holds between TIME_HIGH and TIME_LOW as in its open decoder, OpenEB.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

Columns = list[np.ndarray]  # x uint16, y uint16, t int64, p uint8


class Decoder(Protocol):
    """Words in, events out; keeps what holds from one chunk of words to the next."""

    word: ClassVar[np.dtype]

    def decode(self, words: np.ndarray) -> Columns:
        """Events of the next ``[N]`` words."""
        ...


def _columns(x: np.ndarray, y: np.ndarray, t: np.ndarray, p: np.ndarray) -> Columns:
    return [x.astype(np.uint16), y.astype(np.uint16), t.astype(np.int64, copy=False), p.astype(np.uint8)]


@dataclass
class Dat:
    """Words of 64 bits: 32 of time, 14 of x, 14 of y, 4 of polarity."""

    word: ClassVar[np.dtype] = np.dtype([("t", "<u4"), ("place", "<u4")])
    last: int | None = None  # as it stands in the file
    laps: int = 0

    def decode(self, words: np.ndarray) -> Columns:
        place, t = words["place"], words["t"].astype(np.int64)
        if len(t):
            # The clock of 32 bits starts again after 71 minutes.
            laps = self.laps + np.cumsum(
                np.diff(t, prepend=t[0] if self.last is None else self.last) < -(2**31)
            )
            self.last, self.laps = int(t[-1]), int(laps[-1])
            t += laps << 32
        return _columns(place & 0x3FFF, place >> 14 & 0x3FFF, t, place >> 28)


@dataclass
class Evt2:
    """Words of 32 bits: 4 of type; then 6 of time, 11 of x, 11 of y, or 28 of time's upper part."""

    word: ClassVar[np.dtype] = np.dtype("<u4")
    clock: _Clock = field(default_factory=lambda: _Clock(bits=28))

    def decode(self, words: np.ndarray) -> Columns:
        kind = words >> 28
        high, known, _ = self.clock.follow(kind == 0x8, words & 0xFFFFFFF)
        events = (kind <= 1) & known
        words = words[events]
        t = high[events] << 6 | (words >> 22 & 0x3F)
        return _columns(words >> 11 & 0x7FF, words & 0x7FF, t, words >> 28)


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
class Evt3:
    """Words of 16 bits: 4 of type, 12 of content; what a word does not say holds from words before."""

    word: ClassVar[np.dtype] = np.dtype("<u2")
    clock: _Clock = field(default_factory=lambda: _Clock(bits=12))
    low: int = 0
    y: int = 0
    base: int = 0  # column of the next vector's first pixel
    polarity: int = 0  # of vectors

    def decode(self, words: np.ndarray) -> Columns:
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
        return _columns(x[order], y[at], high[at] << 12 | low[at], p[order])

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
