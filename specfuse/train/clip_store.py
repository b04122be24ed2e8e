"""Clips of the driving world, drawn once and kept on disk in blocks of 16."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from specfuse.data import world
from specfuse.data.world import NUM_CLIPS, WORLD_SEED, Question, clip
from specfuse.train import labels
from specfuse.train.labels import fact_labels, patch_labels

BLOCK = 16
SIZE = 64


class Clips(NamedTuple):
    """C clips with everything that training reads."""

    indices: np.ndarray  # [C] int64
    frames: np.ndarray  # [C, 8, 64, 64, 3] uint8
    patches: np.ndarray  # [C, 8, 64, 2] uint8, see labels.patch_labels
    facts: np.ndarray  # [C, len(FACTS)] int8, see labels.fact_labels
    questions: list[list[Question]]


def load_clips(
    indices: Sequence[int] | np.ndarray,
    directory: str | os.PathLike[str],
    done: Callable[[int], object] = lambda clips: None,
) -> Clips:
    """Clips by index; blocks that are not in ``directory`` yet are drawn and written to it.

    Args:
        indices: of the world's clips, any order.
        directory: of the blocks; created if missing. A broken block is drawn again.
        done: is told how many of the clips are there, after every block.
    """
    indices = np.asarray(indices, np.int64)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    found: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray, list[Question]]] = {}
    wanted = set(indices.tolist())
    for block in sorted({index // BLOCK for index in wanted}):
        for index, *parts in _block(block, directory):
            if index in wanted:
                found[index] = tuple(parts)  # type: ignore[assignment]
        done(len(found))
    frames, patches, facts, questions = zip(*(found[index] for index in indices.tolist()), strict=True)
    return Clips(indices, np.stack(frames), np.stack(patches), np.stack(facts), list(questions))


def _block(
    number: int, directory: Path
) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray, list[Question]]]:
    path = directory / f"world-{WORLD_SEED}-{SIZE}-{_version()}-{number:04d}.npz"
    parts = stored(path, ("frames", "patches", "facts", "questions"), lambda: _draw(number))
    asked = json.loads(parts["questions"].tobytes())
    questions = [[Question(**fields) for fields in clip_] for clip_ in asked]
    first = number * BLOCK
    return [
        (first + i, parts["frames"][i], parts["patches"][i], parts["facts"][i], questions[i])
        for i in range(len(questions))
    ]


def stored(
    path: Path,
    names: Sequence[str],
    draw: Callable[[], dict[str, np.ndarray]],
    write: Callable[..., None] = np.savez,
) -> dict[str, np.ndarray]:
    """The arrays of a file; where it is missing, broken or lacks one, they are drawn and written first."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        parts = draw()
    # Another run may read while this one writes.
    part = path.with_suffix(f".{os.getpid()}.tmp")
    with part.open("wb") as file:
        write(file, **parts)
    part.replace(path)
    return parts


@lru_cache(maxsize=1)
def _version() -> str:
    """Names the code that draws and labels: after a change of it, blocks of before are not read."""
    sources = [*Path(world.__file__).parent.glob("*.py"), Path(labels.__file__)]
    return f"{zlib.crc32(b''.join(path.read_bytes() for path in sorted(sources))):08x}"


def block_of(number: int) -> range:
    """Indices of the clips in a block."""
    return range(number * BLOCK, min((number + 1) * BLOCK, NUM_CLIPS))


def _draw(number: int) -> dict[str, np.ndarray]:
    clips = [clip(i, SIZE) for i in block_of(number)]
    asked = json.dumps([[asdict(question) for question in c.questions] for c in clips])
    return {
        "frames": np.stack([c.frames for c in clips]),
        "patches": np.stack([patch_labels(c) for c in clips]),
        "facts": np.stack([fact_labels(c) for c in clips]),
        "questions": np.frombuffer(asked.encode(), np.uint8),
    }
