"""Event pictures of the driving world's clips, drawn once and kept on disk in blocks of 16."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from specfuse.data.world import WORLD_SEED, events
from specfuse.events.render import render_eventgpt
from specfuse.train.clip_store import BLOCK, SIZE, block_of, stored

NUM_IMAGES = 5  # of each clip, as EventGPT has it
# Pictures a second that the simulated camera follows. Half of ``events``' own rate: the number of events
# differs by one or two in a hundred, and drawing takes half as long.
RATE = 64


def load_event_pictures(
    indices: Sequence[int] | np.ndarray,
    directory: str | os.PathLike[str],
    done: Callable[[int], object] = lambda clips: None,
) -> np.ndarray:
    """``[C, 5, 64, 64, 3]`` uint8: EventGPT's red and blue pictures of clips.

    Args:
        indices: of the world's clips, any order.
        directory: of the blocks; created if missing. Missing and broken blocks are drawn.
        done: is told how many of the clips are there, after every block.
    """
    indices = np.asarray(indices, np.int64)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pictures = np.empty((len(indices), NUM_IMAGES, SIZE, SIZE, 3), np.uint8)
    blocks = indices // BLOCK
    ready = 0
    for number in np.unique(blocks).tolist():
        wanted = np.flatnonzero(blocks == number)
        pictures[wanted] = _block(number, directory)[indices[wanted] - number * BLOCK]
        ready += len(wanted)
        done(ready)
    return pictures


def event_pictures(index: int) -> np.ndarray:
    """``[5, 64, 64, 3]`` uint8: the pictures of one clip, drawn now."""
    return np.stack(render_eventgpt(events(index, SIZE, RATE), NUM_IMAGES, (SIZE, SIZE)))


def _block(number: int, directory: Path) -> np.ndarray:
    path = directory / f"events-{WORLD_SEED}-{SIZE}-{RATE}-{_version()}-{number:04d}.npz"

    def draw() -> dict[str, np.ndarray]:
        return {"pictures": np.stack([event_pictures(index) for index in block_of(number)])}

    # Three colours in large areas: compressed they take a twentieth.
    return stored(path, ("pictures",), draw, np.savez_compressed)["pictures"]


@lru_cache(maxsize=1)
def _version() -> str:
    """Names how clips are drawn, by the pictures of a busy one: after a change, older blocks are not read."""
    return f"{zlib.crc32(event_pictures(0).tobytes()):08x}"
