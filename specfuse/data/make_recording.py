"""Writes the example recording: ``python -m specfuse.data.make_recording OUT.json``.

Synthetic: captions of imagined driving scenes from a small grammar, over a vocabulary of words. Scenes change
slowly, as consecutive clips of one drive do; ``target`` is the long caption, ``draft`` a short one in another
style. The same program writes the same bytes everywhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAMPLES = 400
END = "</s>"
DESCRIPTION = (
    "Synthetic: captions of imagined driving scenes from a small grammar, written by "
    "`python -m specfuse.data.make_recording`. No model produced them. Token ids index `vocabulary`."
)
QUESTIONS = ("What are the key elements in this scene?", "What should the driver watch out for?")

ROADS = ("a winding road", "a city street", "a wide highway", "a narrow country road", "a bridge", "a tunnel")
WEATHERS = ("on a sunny day", "on a cloudy day", "in the rain", "at night", "at dusk")
OBJECTS = {
    "car": ("driving down", "parked on the side of", "waiting at a crossing of"),
    "truck": ("driving ahead on", "parked near"),
    "person": ("walking on the side of", "crossing", "standing next to"),
    "bicycle": ("moving along", "leaning against a wall beside"),
    "bus": ("stopped on", "turning onto"),
    "traffic light": ("hanging over", "standing at the corner of"),
    "motorcycle": ("overtaking on", "parked on the side of"),
}
BACKGROUNDS = ("a mountain", "a row of trees", "tall buildings", "a field", "a river", "a parking lot")
OPENINGS = ("The key elements in this scene include", "The scene shows", "In this scene there is")
WARNINGS = ("The driver should watch out for", "The main thing to watch is", "Attention should be on")


class _Dice:
    """A random number generator that is the same in every Python (splitmix64)."""

    def __init__(self, seed: int):
        self.state = seed

    def below(self, n: int) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = self.state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return (z ^ (z >> 31)) % n

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def choose(self, values: Sequence[Any]) -> Any:
        return values[self.below(len(values))]


class _Scene:
    """What the imagined camera sees; it drifts from clip to clip."""

    def __init__(self, dice: _Dice):
        self.dice = dice
        self.road, self.weather = dice.choose(ROADS), dice.choose(WEATHERS)
        self.background = dice.choose(BACKGROUNDS)
        self.things = [self._thing() for _ in range(2 + dice.below(2))]

    def _thing(self) -> tuple[str, str]:
        noun = self.dice.choose(list(OBJECTS))
        return noun, self.dice.choose(OBJECTS[noun])

    def drift(self) -> None:
        if self.dice.chance(4):
            self.__init__(self.dice)  # type: ignore[misc]  # another drive
        if self.dice.chance(35):
            self.things[self.dice.below(len(self.things))] = self._thing()
        if self.dice.chance(12):
            self.background = self.dice.choose(BACKGROUNDS)

    def caption(self) -> str:
        road = self.road.split(" ", 1)[1]
        listed = [f"a {noun} {doing} the {road}" for noun, doing in self.things]
        listed[0] = f"a {self.things[0][0]} {self.things[0][1]} {self.road}"
        text = f"{self.dice.choose(OPENINGS)} {' , '.join(listed[:-1])} , and {listed[-1]} {self.weather} . "
        noun, doing = self.things[0]
        text += f"The {noun} is {doing} the {road} , "
        text += f"and there is {self.background} in the background . "
        if self.dice.chance(60):
            text += f"The {self.things[-1][0]} is close to the {noun} . "
        return text + END

    def warning(self) -> str:
        noun, doing = self.things[-1]
        text = f"{self.dice.choose(WARNINGS)} the {noun} {doing} {self.road} {self.weather} . "
        return text + f"The {self.things[0][0]} is less important . {END}"

    def note(self) -> str:
        nouns = " , ".join(noun for noun, _ in self.things)
        return f"I see {nouns} and {self.background} , {self.weather} . {END}"


def make_recording(samples: int = SAMPLES, seed: int = 2026) -> dict[str, Any]:
    """The recording as the object that its JSON file holds. See :mod:`specfuse.data.recording`."""
    dice = _Dice(seed)
    scene = _Scene(dice)
    vocabulary: dict[str, int] = {}

    def encode(text: str) -> list[int]:
        return [vocabulary.setdefault(word, len(vocabulary)) for word in text.split()]

    recorded = []
    for i in range(samples):
        scene.drift()
        # The second question is asked about every fourth clip.
        for question in QUESTIONS[: 2 if i % 4 == 3 else 1]:
            target = encode(scene.caption() if question == QUESTIONS[0] else scene.warning())
            sample = {"id": f"clip {i}", "target": target, "draft": encode(scene.note())}
            recorded.append(sample if question == QUESTIONS[0] else {**sample, "question": question})
    return {
        "description": DESCRIPTION,
        "question": QUESTIONS[0],
        "vocabulary": list(vocabulary),
        "samples": recorded,
    }


def recording_text(recording: dict[str, Any]) -> str:
    """JSON with one sample per line, so that differences can be read."""
    head = {key: value for key, value in recording.items() if key != "samples"}
    lines = [json.dumps(sample, separators=(",", ":")) for sample in recording["samples"]]
    return json.dumps(head)[:-1] + ',\n"samples": [\n' + ",\n".join(lines) + "\n]}\n"


def main(arguments: Sequence[str]) -> int:
    """Writes the recording to the one path given."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m specfuse.data.make_recording OUT.json", file=sys.stderr)
        return 2
    Path(arguments[0]).write_text(recording_text(make_recording()), encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
