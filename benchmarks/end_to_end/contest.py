"""Rounds: every question through every competitor in turn; tokens are compared, answers timed."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from end_to_end.systems import Asked, System
from specfuse.demo import FirstToken, counted


class Timed(NamedTuple):
    """One answer of one competitor."""

    round: int
    question: int  # its number
    turn: int  # 0 for the first question about a clip
    scored: bool
    seconds: float  # the whole call of generate
    first_seconds: float  # to the first token
    tokens: int
    passes: int  # forward passes of the target
    shares: dict[str, float]  # specfuse: of prefill, draft, verify, commit in the call's wall time


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Differs(Exception):
    """A competitor gave other tokens than the first."""


def warm_up(systems: Sequence[System], questions: Sequence[Asked], memory: bool = True) -> dict[str, int]:
    """Compares all answers before anything is timed; returns peak bytes of tensors of each competitor.

    With ``memory`` off it returns nothing, and is quicker.

    Raises:
        Differs: names competitor and question.
    """
    peaks: dict[str, int] = {}
    for asked in questions:
        expected: list[int] | None = None
        for system in systems:
            _, tokens, peak = _measured(system, asked, memory=memory and len(peaks) < len(systems))
            if peak is not None:
                peaks[system.name] = peak
            expected = tokens if expected is None else expected
            _compare(system, asked, tokens, expected)
    return peaks


def run(
    systems: Sequence[System],
    questions: Sequence[Asked],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    tell: Callable[[int, Asked], object] = lambda number, asked: None,
) -> dict[str, list[Timed]]:
    """All questions ``rounds`` times, by competitor; another one begins each time.

    Every round starts with drafters that know nothing and empty vision caches.

    Raises:
        Differs: names competitor and question; answers are compared every time.
    """
    found: dict[str, list[Timed]] = {system.name: [] for system in systems}
    turns = 0
    for number in range(rounds):
        for system in systems:
            system.begin()
        for place, asked in enumerate(questions):
            answers = {}
            for step in range(len(systems)):
                system = systems[(turns + step) % len(systems)]
                timed, answers[system.name], _ = _measured(system, asked, clock)
                found[system.name].append(timed._replace(round=number, question=place))
            for system in systems:
                _compare(system, asked, answers[system.name], answers[systems[0].name])
            turns += 1
            tell(place, asked)
    return found


def _compare(system: System, asked: Asked, tokens: list[int], expected: list[int]) -> None:
    if tokens != expected:
        where = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), "the end")
        raise Differs(
            f"{system.name} gave other tokens about clip {asked.clip}, from token {where}: not compared"
        )


def _measured(
    system: System, asked: Asked, clock: Callable[[], float] = time.perf_counter, memory: bool = False
) -> tuple[Timed, list[int], int | None]:
    asked.prepare()
    system.before(asked)
    counting = counted(system.model) if system.counted else nullcontext([0])
    watch, device = FirstToken(clock), next(system.model.parameters()).device
    peak = PeakMemory(device) if memory else None
    with counting as passes, peak or nullcontext():
        wait(device)
        start, begin = clock(), time.perf_counter()
        sequences = system.answer(asked, watch)
        wait(device)
        seconds, wall = clock() - start, time.perf_counter() - begin
    tokens = sequences[0, asked.inputs["input_ids"].shape[1] :].tolist()
    stats = system.stats
    made = passes[0] if system.counted else len(tokens) if stats is None else stats.passes
    names = ("prefill", "draft", "verify", "commit") if stats is not None else ()
    shares = {name: getattr(stats, f"{name}_ms") / 1e3 / wall for name in names}
    timed = Timed(0, 0, asked.turn, asked.scored, seconds, watch.at - start, len(tokens), made, shares)
    return timed, tokens, None if peak is None else peak.bytes


def wait(device: torch.device) -> None:
    """Lets a GPU finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drops what native code writes to the standard error: the profiler logs each start and stop."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


class PeakMemory:
    """Most bytes of tensors that were alive at once inside the block, beyond what was alive before."""

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        # What others left behind must not be freed, and counted, inside the block.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            activities = [torch.profiler.ProfilerActivity.CPU]
            self.profile: Any = torch.profiler.profile(activities=activities, profile_memory=True)
            with quiet_stderr():
                self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
            return
        with quiet_stderr():
            self.profile.__exit__(*error)
        alive = 0
        for event in self.profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                self.bytes = max(self.bytes, alive)
