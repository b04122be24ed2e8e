"""What a factual question is made of."""

from __future__ import annotations

from typing import NamedTuple


class Fact(NamedTuple):
    """One factual question with its answer."""

    kind: str
    questions: tuple[str, ...]  # ways to ask it
    answer: str  # canonical
    long: tuple[str, ...]  # ways in which the target says the answer
    short: tuple[str, ...]  # and the drafter
    related: tuple[str, ...]  # aspects of the scene that go with it
