"""The training loop of every stage: a rate that follows the time left, and what a run resumes from."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STATE = "training.pt"
"""What a run resumes from, in the directory that it writes."""
WARM_UP = 60  # steps
LAST_RATE = 0.02  # of the highest
CLIP_NORM = 1.0
SAVE_EVERY_SECONDS = 60.0
Report = Callable[[str, float, str], None]  # stage, share done, what to show


@dataclass(slots=True)
class Budget:
    """How long a stage lasts: a number of steps if given, else seconds of training."""

    seconds: float
    steps: int | None = None

    def share(self, step: int, seconds: float) -> float:
        """How much of it is used, 0 to 1."""
        used = seconds / max(self.seconds, 1e-9) if self.steps is None else step / max(self.steps, 1)
        return min(used, 1.0)


@dataclass(slots=True)
class Progress:
    """How far one stage is."""

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def rate_at(step: int, share: float) -> float:
    """The learning rate as a share of the highest: a short linear rise, then half a cosine."""
    falling = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * share))
    return min(1.0, (step + 1) / WARM_UP) * falling


def run_stage(
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int, float], Tensor],
    budget: Budget,
    progress: Progress,
    save: Callable[[], None],
    report: Callable[[Progress, float], None],
) -> None:
    """Trains until the budget is used; ``loss_at(step, share of the budget)`` is the loss of one batch.

    Groups of ``optimizer`` carry their highest learning rate as ``"rate"``. Ctrl-C ends the run after the
    step it falls into, with its state saved; a second one ends it at once.

    Raises:
        FloatingPointError: the loss is not a number any more.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    with _interrupts() as interrupted:
        _steps(optimizer, loss_at, budget, progress, save, report, interrupted)
    save()
    if interrupted.is_set():
        raise KeyboardInterrupt("interrupted; the state is saved, --resume continues from it")


def _steps(
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int, float], Tensor],
    budget: Budget,
    progress: Progress,
    save: Callable[[], None],
    report: Callable[[Progress, float], None],
    interrupted: threading.Event,
) -> None:
    saved = time.monotonic()
    while (share := budget.share(progress.step, progress.seconds)) < 1 and not interrupted.is_set():
        began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * rate_at(progress.step, share)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_at(progress.step, share)
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(f"the loss is {value} at step {progress.step}")
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        progress.step += 1
        progress.losses.append(value)
        progress.seconds += time.monotonic() - began
        report(progress, budget.share(progress.step, progress.seconds))
        if time.monotonic() - saved > SAVE_EVERY_SECONDS:
            save()
            saved = time.monotonic()


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Holds back the first Ctrl-C inside the block; the event is set instead.

    An exception in the middle of a step would leave weights of one step and the optimizer of another.
    """
    interrupted = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    # Only the main thread may handle signals; one that is ignored (nohup, &) stays ignored.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield interrupted
        return

    def note(number: int, frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def check_run(directory: Path, minutes: float | None, resume: bool) -> None:
    """Raises for a directory that a run must not write to, or can not be resumed from, and for no time.

    Raises:
        NotADirectoryError: the directory is a file.
        FileExistsError: it holds files and ``resume`` is not set.
        FileNotFoundError: ``resume`` is set and there is nothing to resume.
        ValueError: minutes of 0 or below.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(20, "not a directory", str(directory))
    if not resume and directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty")
    if resume and not (directory / STATE).exists():
        raise FileNotFoundError(2, "no training to resume", str(directory / STATE))
    if minutes is not None and minutes <= 0:
        raise ValueError(f"minutes must be above 0, got {minutes}")


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Writes what a run resumes from; an interrupted write leaves the old file."""
    part = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(state, part)
    part.replace(path)


def read_state(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Reads it back.

    Raises:
        FileNotFoundError: nothing to resume from.
        ValueError: a broken file, or one of a run with other settings.
    """
    if not path.exists():
        raise FileNotFoundError(2, "no training to resume", str(path))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["settings"]
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        text = (" ".join(str(error).split()) or type(error).__name__)[:120]
        raise ValueError(f"{path} is no training state or is broken: {text}") from None
    except Exception as error:  # what unpickling raises on garbage has no common base class
        raise ValueError(f"{path} is no training state or is broken: {type(error).__name__}") from None
    different = [name for name, value in settings.items() if found.get(name) != value]
    if different:
        name = different[0]
        raise ValueError(f"{path} belongs to a run with {name}={found.get(name)!r}, not {settings[name]!r}")
    return state


@dataclass(slots=True, kw_only=True)
class RunSettings:
    """What runs of one stage, which learn from what a target says, have in common."""

    directory: Path
    target: Path
    cache: Path  # of drawn clips, and of what the target says
    command: str
    minutes: float | None = None
    steps: int | None = None  # instead of minutes
    seed: int = 0
    resume: bool = False
    device: str = "cpu"


@dataclass(slots=True)
class RunState:
    """What a run of one stage resumes from.

    Args:
        path: of the file.
        identity: what a file must agree about to be resumed.
        modules: the weights, by name.
        optimizer: over them.
        minutes: that the run was given; a resumed one takes them over where it is given none.
    """

    path: Path
    identity: dict[str, Any]
    modules: Mapping[str, torch.nn.Module]
    optimizer: torch.optim.Optimizer
    minutes: float | None = None
    progress: Progress = field(default_factory=Progress)

    def save(self) -> None:
        """Writes the file."""
        state = {name: module.state_dict() for name, module in self.modules.items()}
        kept = {"settings": self.identity, "minutes": self.minutes, "progress": asdict(self.progress)}
        write_state(self.path, state | kept | {"optimizer": self.optimizer.state_dict()})

    def load(self) -> None:
        """Reads it; raises what ``read_state`` does, and ValueError for weights of other shapes."""
        state = read_state(self.path, self.identity)
        try:
            for name, module in self.modules.items():
                module.load_state_dict(state[name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(**state["progress"])
            if self.minutes is None:
                self.minutes = state["minutes"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.path} does not fit this model: {str(error).splitlines()[0]}") from None
