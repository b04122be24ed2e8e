"""Reads factual answers back from text. Only the first sentence counts, and it must not hedge."""

from __future__ import annotations

import re

_NUMBERS = {
    "0": r"no|zero|none|nobody",
    "1": r"one|1|single",
    "2": r"two|2",
    "3": r"three|3",
    "4": r"four|4",
    "5": r"five|5",
    "6": r"six|6",
}
_COLOURS = {name: name for name in ("red", "blue", "green", "yellow", "white", "black")}
_SIDES = {"left": "left", "right": "right"}
_YES_NO = {"yes": "yes", "no": r"no|not|cannot"}

# Per kind: canonical answer and the words that mean it.
READINGS: dict[str, dict[str, str]] = {
    "count_cars": _NUMBERS,
    "count_people": _NUMBERS,
    "nearest_colour": _COLOURS,
    "truck_colour": _COLOURS,
    "turn": {**_SIDES, "straight": "straight"},
    "speed": {
        "standing": r"stand|stands|standing|stopped|stationary",
        "slow": r"slow|slowly|low",
        "fast": "fast|high",
    },
    "weather": {"clear": "clear|sunny", "rain": r"rain\w*", "fog": r"fog\w*", "snow": r"snow\w*"},
    "time_of_day": {
        "day": "day|daytime|daylight",
        "dusk": "dusk|evening|sunset",
        "night": "night|dark|darkness",
    },
    "road_type": {
        "country": "country|rural",
        "curve": r"curve\w*|bend\w*",
        "junction": "junction|intersection|crossroads",
        "city": "city|urban|town",
        "highway": "highway|motorway",
    },
    "signal": {"red": "red", "yellow": "yellow", "green": "green", "none": "no|none|not"},
    "side": _SIDES,
    "compare": _YES_NO,
    "presence": _YES_NO,
}


def read_answer(kind: str, text: str) -> str | None:
    """The canonical answer in the first sentence of ``text``; None if there is none, or more than one.

    Raises:
        ValueError: ``kind`` is not a factual kind.
    """
    if kind not in READINGS:
        raise ValueError(f"kind must be one of {', '.join(READINGS)}, got {kind!r}")
    first = re.split(r"(?<=[.!?])\s|\n", text.strip().lower(), maxsplit=1)[0]
    found = [name for name, words in READINGS[kind].items() if re.search(rf"\b(?:{words})\b", first)]
    return found[0] if len(found) == 1 else None
