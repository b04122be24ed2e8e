"""Which clips belong to one drive, and which drives are held out.

As in DSEC, clips are cut from drives: consecutive clips show the same place in the same weather. A drive is
either trained on or held out as a whole, so no held-out scene has been seen.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from specfuse.data.world.scene import generator

WORLD_SEED = 2026
NUM_CLIPS = 5208
NUM_HELD_OUT = 1042
NUM_TRAIN = NUM_CLIPS - NUM_HELD_OUT
DRIVE_LENGTHS = (4, 8)  # clips, shortest and longest


class Drives(NamedTuple):
    """The drives of one world; F of them."""

    first: np.ndarray  # [F] int64, index of a drive's first clip
    length: np.ndarray  # [F] int64, its clips
    held_out: np.ndarray  # [F] bool


@lru_cache(maxsize=4)
def drives(world_seed: int = WORLD_SEED) -> Drives:
    """The drives of a world: always NUM_CLIPS clips, of which exactly NUM_HELD_OUT are held out."""
    rng = generator(world_seed, 0, 0)
    length = _cut(rng, NUM_CLIPS)
    held_out = np.zeros(len(length), dtype=bool)
    left = NUM_HELD_OUT
    # A drive is taken if the rest can still be filled with whole drives; the last one fits exactly.
    for drive in rng.permutation(len(length)):
        rest = left - length[drive]
        if rest == 0 or rest >= DRIVE_LENGTHS[0]:
            held_out[drive] = True
            left = rest
        if left == 0:
            break
    first = np.cumsum(length) - length
    return Drives(first, length, held_out)


def _cut(rng: np.random.Generator, total: int) -> np.ndarray:
    shortest, longest = DRIVE_LENGTHS
    lengths = []
    while total:
        choices = [n for n in range(shortest, longest + 1) if total - n == 0 or total - n >= shortest]
        lengths.append(int(rng.choice(choices)))
        total -= lengths[-1]
    return np.array(lengths, dtype=np.int64)


def drive_of(clip: int, world_seed: int = WORLD_SEED) -> int:
    """The drive a clip was cut from.

    Raises:
        IndexError: there is no such clip.
    """
    if not 0 <= clip < NUM_CLIPS:
        raise IndexError(f"clip must be 0 to {NUM_CLIPS - 1}, got {clip}")
    return int(np.searchsorted(drives(world_seed).first, clip, side="right")) - 1


def split(name: str, world_seed: int = WORLD_SEED) -> np.ndarray:
    """Clip indices of ``"train"`` (4,166) or ``"held_out"`` (1,042), ascending, int64.

    Raises:
        ValueError: another name.
    """
    if name not in ("train", "held_out"):
        raise ValueError(f'split must be "train" or "held_out", got {name!r}')
    table = drives(world_seed)
    of_clip = np.repeat(table.held_out, table.length)
    return np.flatnonzero(of_clip == (name == "held_out"))
