"""What a clip teaches a vision tower: facts about the clip, and what each patch of a frame shows."""

from __future__ import annotations

import numpy as np

from specfuse.data.world import Clip
from specfuse.data.world.fact_things import SUBJECTS
from specfuse.data.world.scene import COLOURS, SCENERY, SIGNALS, VEHICLES, Thing
from specfuse.data.world.score import READINGS
from specfuse.data.world.visible import survey

GRID = 8  # patches along a side of a frame
LEAST_PIXELS = 4  # of 64: below this a patch counts as empty
UNKNOWN = -1  # a fact that the clip leaves open

# Kinds of questions whose answer is the same however they are worded.
CLIP_FACTS = tuple(kind for kind in READINGS if kind not in ("side", "compare", "presence"))
# Name of a fact: how many values it has.
FACTS: dict[str, int] = {kind: len(READINGS[kind]) for kind in CLIP_FACTS} | dict.fromkeys(SUBJECTS, 2)

CENTRES = ("car", "truck", "pedestrian", "cyclist", "signal", "sign")
SHOWN = tuple(
    name
    for kind in (*CENTRES, *SCENERY)
    for name in (
        [f"{colour} {kind}" for colour in COLOURS]
        if kind in VEHICLES
        else [f"{colour} {kind}" for colour in SIGNALS]
        if kind == "signal"
        else [kind]
    )
)


def fact_labels(clip: Clip) -> np.ndarray:
    """``[len(FACTS)]`` int8: the index of each fact's value, UNKNOWN where nothing is asked about it."""
    asked = {question.kind: question.answer for question in clip.questions if question.answer is not None}
    # A missing traffic light is a fact even where the question was left out to keep answers balanced.
    asked.setdefault("signal", "none")
    values = [list(READINGS[kind]).index(asked[kind]) if kind in asked else UNKNOWN for kind in CLIP_FACTS]
    there = [known(clip.view) for _, _, known in SUBJECTS.values()]
    return np.array([*values, *(UNKNOWN if value is None else int(value) for value in there)], np.int8)


def patch_labels(clip: Clip) -> np.ndarray:
    """``[8, GRID * GRID, 2]`` uint8: what each patch shows most of, and whose middle it holds.

    The first counts from 1 through SHOWN, the second from 1 through CENTRES; 0 is nothing.
    """
    owner = survey(clip.scene).owner
    frames, size, _ = owner.shape
    labels = np.zeros((frames, GRID * GRID, 2), np.uint8)
    cell = np.arange(size) * GRID // size
    patch_of = cell[:, None] * GRID + cell[None, :]
    most = np.full((frames, GRID * GRID), LEAST_PIXELS - 1)
    for index, thing in enumerate(clip.scene.things):
        mine = owner == index
        kind = 1 + SHOWN.index(_name(thing))
        for frame in np.flatnonzero(mine.any((1, 2))):
            pixels = np.bincount(patch_of[mine[frame]], minlength=GRID * GRID)
            wins = pixels > most[frame]
            labels[frame, wins, 0] = kind
            most[frame, wins] = pixels[wins]
            if thing.kind in CENTRES and pixels.sum() >= LEAST_PIXELS:
                row, column = (int(axis.mean()) for axis in np.nonzero(mine[frame]))
                labels[frame, patch_of[row, column], 1] = 1 + CENTRES.index(thing.kind)
    return labels


def _name(thing: Thing) -> str:
    return f"{thing.colour} {thing.kind}" if thing.kind in (*VEHICLES, "signal") else thing.kind
