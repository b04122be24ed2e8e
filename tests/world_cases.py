"""Clips that several tests of the driving world look at, made once; and what a text about one claims."""

from __future__ import annotations

import re
from functools import lru_cache

from specfuse.data.world import Clip, clip
from specfuse.data.world.scene import COLOURS
from specfuse.data.world.visible import View
from specfuse.data.world.wording import NUMBERS

STRIDE = 23  # longer than a drive: every clip of the sample is from another one


@lru_cache(maxsize=1)
def sample() -> tuple[Clip, ...]:
    return tuple(clip(index, size=32) for index in range(5, 5208, STRIDE))


def wrong_claims(text: str, view: View, describes: bool = True) -> list[str]:
    """What a text says that the view does not show; ``describes``: it answers no yes-or-no question."""
    text = text.lower()
    scene = view.scene
    wrong = []
    numbers, colours = "|".join(NUMBERS), "|".join(COLOURS)
    counted = rf"\b({numbers}) (?:(?:{colours}) )?(cars?|pedestrians?|people|person)\b(?! crossing)"
    for count, noun in re.findall(counted, text):
        kind = "car" if noun.startswith("car") else "pedestrian"
        if NUMBERS.index(count) != len(view.of(kind)):
            wrong.append(f"{count} {noun}")
    for colour, noun in re.findall(rf"\ba (?:large )?({colours}) (one|car|truck)\b", text):
        if colour not in {v.colour for v in view.of("truck" if noun == "truck" else "car")}:
            wrong.append(f"{colour} {noun}")
    states = {
        "rain": scene.weather == "rain",
        "snow": scene.weather == "snow",
        "fog": scene.weather == "fog",
        "clear": scene.weather == "clear",
        "dusk|sunset|evening": scene.light == "dusk",
        "night|dark|darkness": scene.light == "night",
        "day|daylight|daytime": scene.light == "day",
        "turns to the left|turning left|into a left turn": scene.ego.turn == "left",
        "turns to the right|turning right|into a right turn": scene.ego.turn == "right",
    }
    if describes:
        states |= {
            "truck": bool(view.of("truck")),
            "cyclist|bike": bool(view.of("cyclist")),
            "traffic light|red light|wait for green": bool(view.of("signal")),
            "sign": bool(view.of("sign")),
            "trees?": view.scenery["tree"] is True,
            "buildings?|houses?": view.scenery["building"] is True,
        }
    return wrong + [
        words for words, true in states.items() if not true and re.search(rf"\b(?:{words})\b", text)
    ]
