"""Choices of words that are the same every time, and mostly the same within a drive."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

FRESH = 0.3  # share of choices that a clip makes anew; the others are those of its drive
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def _mix(seed: int) -> int:
    """Splitmix64: one well mixed 64-bit number from another."""
    z = (seed + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


class Wording:
    """Picks among synonyms.

    A choice depends on its slot's name, not on earlier choices: without one sentence the others stay.
    """

    def __init__(self, world_seed: int, drive: int, clip: int, voice: str):
        start = _mix(world_seed ^ zlib.crc32(voice.encode()))
        self._drive = _mix(start ^ (2 * drive))
        self._clip = _mix(start ^ (2 * clip + 1))

    def pick(self, slot: str, options: Sequence[T]) -> T:
        """One of the options."""
        name = zlib.crc32(slot.encode())
        own = _mix(self._clip ^ name)
        seed = own if own % 1000 < 1000 * FRESH else _mix(self._drive ^ name)
        return options[_mix(seed) % len(options)]

    def fresh(self, slot: str) -> float:
        """A number of this clip alone, evenly spread over [0, 1)."""
        return _mix(self._clip ^ zlib.crc32(slot.encode()) ^ 0x5EED) / 2**64


def number(count: int) -> str:
    """0 to 6 as a word; nothing is no."""
    return NUMBERS[count]


def listing(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def sentence(text: str) -> str:
    """Text with a capital first letter and one full stop."""
    text = " ".join(text.split())
    return text[:1].upper() + text[1:] + "."


def compose(wanted: Sequence[str], fillers: Sequence[str], least: int, most: int) -> str:
    """Joins what is wanted, as far as ``most`` words allow, then fillers until there are ``least`` words."""
    taken: list[str] = []
    count = 0
    for text, needed in [*((text, True) for text in wanted), *((text, False) for text in fillers)]:
        words = len(text.split())
        if text and text not in taken and count + words <= most and (needed or count < least):
            taken.append(text)
            count += words
    return " ".join(taken)
