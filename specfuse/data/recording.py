"""Recordings: answers of a model kept as token ids, for ``specfuse replay``.

A recording is a JSON object::

    {"description": "where it comes from",           optional
     "question": "What is in this scene?",           optional, for samples without their own
     "samples": [{"target": [450, 1820, 3161],       token ids of the answer, at least one
                  "draft": [512, 278],               optional: another model's answer on the same input
                  "id": "clip 17",                   optional
                  "question": "..."}]}               optional

Samples stand in the order in which they were asked. Other keys are ignored. ``draft`` may be empty.
"""

from __future__ import annotations

import json
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

EXAMPLE = "example"
_LARGEST_ID = 2**31 - 2


class Sample(NamedTuple):
    """One recorded answer."""

    target: tuple[int, ...]  # token ids, not empty
    draft: tuple[int, ...] | None  # another model's answer on the same input
    question: str
    id: str


class Recording(NamedTuple):
    """A file of recorded answers."""

    samples: list[Sample]
    description: str

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id of any answer."""
        return 1 + max(max((*sample.target, *(sample.draft or ()))) for sample in self.samples)

    @property
    def questions(self) -> list[str]:
        """The different questions in order of appearance."""
        return list(dict.fromkeys(sample.question for sample in self.samples))


def load_recording(path: str | PathLike[str]) -> Recording:
    """Reads a recording; the name ``example`` stands for the small synthetic one that comes with the package.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a recording; says what is wrong, and in which sample.
    """
    if str(path) == EXAMPLE:
        text = resources.files("specfuse.data").joinpath("example_recording.json").read_text("utf-8")
        return parse_recording(text, EXAMPLE)
    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a JSON file (it is not UTF-8 text)") from None
    return parse_recording(text, str(path))


def parse_recording(text: str, name: str) -> Recording:
    """A recording from JSON text; ``name`` says in errors where it came from. Raises ValueError."""
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("samples"), list):
        raise ValueError(f'{name}: a recording is a JSON object with a list "samples"')
    if not content["samples"]:
        raise ValueError(f'{name}: "samples" is empty')
    question = _text(content, "question", name)
    samples = [_sample(value, question, f"{name}: sample {i}") for i, value in enumerate(content["samples"])]
    return Recording(samples, _text(content, "description", name))


def _sample(value: Any, question: str, where: str) -> Sample:
    if not isinstance(value, dict) or "target" not in value:
        raise ValueError(f'{where} must be an object with "target", got {_short(value)}')
    target = _tokens(value["target"], f"{where}: target")
    if not target:
        raise ValueError(f"{where}: target is empty")
    draft = value.get("draft")
    return Sample(
        target,
        None if draft is None else _tokens(draft, f"{where}: draft"),
        _text(value, "question", where) or question,
        str(value.get("id", "")),
    )


def _tokens(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list of token ids, got {_short(value)}")
    for token in value:
        # bool is an int to Python, but not a token id.
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= _LARGEST_ID:
            raise ValueError(f"{where} must hold ids from 0 to {_LARGEST_ID}, got {_short(token)}")
    return tuple(value)


def _text(content: dict[str, Any], key: str, where: str) -> str:
    value = content.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be text, got {_short(value)}")
    return value or ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
