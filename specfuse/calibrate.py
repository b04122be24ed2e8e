"""Calibrates cosine acceptance on the driving world: ``specfuse align calibrate``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from specfuse.acceptance.calibration import AgreementModel, Observations, choose
from specfuse.acceptance.cosine import draft_chance, node_cosines
from specfuse.acceptance.reliability import reliability
from specfuse.acceptance.rule import AcceptanceRule, Judgement, ScoredTree
from specfuse.adapters import AdapterModel, kind_of
from specfuse.data.world import Question, split
from specfuse.data.world.splits import drive_of
from specfuse.drafters import Drafter
from specfuse.generate import SpeculativeGenerator
from specfuse.session import FIRST_TURN
from specfuse.train.clip_store import load_clips
from specfuse.train.event_store import load_event_pictures

LONGEST = 160  # tokens of an answer


class Asked(NamedTuple):
    """One question about a clip of the world, ready for ``generate``."""

    clip: int
    question: Question
    inputs: dict[str, Any]


class Observing(AcceptanceRule):
    """Overrules nothing and notes, wherever a lossless answer came by, what an estimate could go by."""

    name = "observing"
    needs_states = True

    def __init__(self, adapter: AdapterModel | None):
        self.adapter, self.group = adapter, 0
        self.rows: list[tuple[float, float, bool, int]] = []

    def judge(self, scored: ScoredTree) -> Judgement:
        return _Noting(self, scored)

    def observations(self) -> Observations:
        """Everything so far."""
        columns = list(zip(*self.rows, strict=True)) or [(), (), (), ()]
        types = (np.float64, np.float64, np.bool_, np.int64)
        return Observations(*(np.array(c, t) for c, t in zip(columns, types, strict=True)))


class _Noting(Judgement):
    def __init__(self, rule: Observing, scored: ScoredTree):
        self.rule, self.scored = rule, scored
        self.cosines = node_cosines(scored, rule.adapter)

    def visit(self, row: int, node: int) -> None:
        scored, likeliest = self.scored, self.scored.children[row][node][0]
        if node in self.cosines[row]:
            agreed = scored.tokens[row][likeliest] == scored.picks[row][node]
            chance = draft_chance(scored, row, likeliest)
            self.rule.rows.append((self.cosines[row][node], chance, agreed, self.rule.group))


def held_out_clips(part: str, count: int) -> np.ndarray:
    """Clips of the held-out split, spread evenly over its drives: "calibrate" and "measure" share none.

    Raises:
        ValueError: another part, or more clips than it has.
    """
    if part not in ("calibrate", "measure"):
        raise ValueError(f'part must be "calibrate" or "measure", got {part!r}')
    every = split("held_out")
    number = np.unique([drive_of(int(clip)) for clip in every], return_inverse=True)[1]
    mine = every[number % 2 == (part == "measure")]
    if not 1 <= count <= len(mine):
        raise ValueError(f"clips must be from 1 to {len(mine)}, got {count}")
    return mine[np.linspace(0, len(mine) - 1, count).astype(int)]


def world_questions(
    clips: np.ndarray, count: int, processor: Any, drafter: Any, cache: str | os.PathLike[str], seed: int
) -> Iterator[Asked]:
    """``count`` questions about each clip, with the events of the scene for a drafter that takes them."""
    found = load_clips(clips, cache)
    pictures = load_event_pictures(clips, cache) if hasattr(drafter, "see") else None
    draw = np.random.default_rng(seed)
    for place, (clip, frames) in enumerate(zip(clips.tolist(), found.frames, strict=True)):
        events = None if pictures is None else drafter.see(event_images=[list(pictures[place])])
        questions = found.questions[place]
        for chosen in sorted(draw.permutation(len(questions))[:count].tolist()):
            text = FIRST_TURN.format(question=questions[chosen].text)
            inputs = dict(processor(text=text, videos=frames, return_tensors="pt"))
            yield Asked(clip, questions[chosen], inputs if events is None else inputs | {"events": events})


def calibrate(
    model: Any,
    processor: Any,
    drafter: Drafter,
    adapter: AdapterModel | None,
    cache: str | os.PathLike[str],
    *,
    clips: int = 60,
    questions: int = 6,
    max_nodes: int = 16,
    seed: int = 0,
    tell: Callable[[str, float, str], None] = lambda stage, share, text: None,
) -> AgreementModel:
    """Answers questions losslessly, notes cosine and draft probability, fits on half of the drives.

    Args:
        model, processor: the target.
        drafter: one that gives states.
        adapter: from its states to the target's, or None.
        cache: of drawn clips.
        clips: held out of every training; half of their drives are kept for ``about["report"]``.
        questions: about each.
        max_nodes: as in the use that is meant.
        seed: of the questions.
        tell: is told about progress.

    Raises:
        ValueError: a drafter without states, a number out of range, or too few clips to fit and check.
    """
    if clips < 8 or questions < 1:
        raise ValueError(f"clips must be at least 8 and questions 1, got {clips} and {questions}")
    chosen = held_out_clips("calibrate", clips)
    rule = Observing(adapter)
    generator = SpeculativeGenerator(model, drafter, max_nodes=max_nodes, accept=rule)
    asked = 0
    for each in world_questions(chosen, questions, processor, drafter, cache, seed):
        rule.group = drive_of(each.clip)
        inputs = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in each.inputs.items()}
        generator.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        asked += 1
        tell("answers", asked / (clips * questions), f"{len(rule.rows)} places")
    tell("answers", 1.0, f"{len(rule.rows)} places in {asked} answers")
    return fit_and_check(rule.observations(), adapter, drafter)


def fit_and_check(seen: Observations, adapter: AdapterModel | None, drafter: object) -> AgreementModel:
    """A model of what was observed, fitted on every second drive; ``about`` tells how it did on the others.

    Raises:
        ValueError: places of fewer than three drives.
    """
    drives = np.unique(seen.groups)
    if len(drives) < 3:
        raise ValueError(f"observations must come from at least 3 drives, got {len(drives)}")
    fitting = np.searchsorted(drives, seen.groups) % 2 == 0
    model, losses = choose(seen.take(fitting))
    model.about = {
        "adapter": None if adapter is None else kind_of(adapter),
        "drafter": type(drafter).__name__,
        "fitted_on": int(fitting.sum()),
        "log_loss_left_out": losses,
        "report": reliability(model, seen.take(~fitting)),
    }
    return model
