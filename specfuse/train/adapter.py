"""Trains an adapter between a drafter's and a target's features: ``specfuse train adapter``."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specfuse.adapters import KINDS
from specfuse.train.adapter_card import write_adapter_card, write_adapter_curves
from specfuse.train.adapter_losses import LOSSES, build_adapter, make_loss, validation_score
from specfuse.train.adapter_pairs import Pairs
from specfuse.train.adapter_report import align_report
from specfuse.train.batches import generator
from specfuse.train.loop import STATE, Budget, Progress, Report, check_run, read_state, run_stage, write_state

ABOUT = "alignment.json"
RATE = 1e-3
RATES = {"cross-attention": 3e-3, "expander": 5e-3, "compression": 3e-3}  # of kinds that learn places too
WEIGHT_DECAY = 0.01
BATCH_NUMBERS = 2**18  # of the targets of a step
SMALLEST_BATCH, LARGEST_BATCH = 16, 256  # samples
SMALL_BATCHES = {"compression": 64}  # a step of 16 distributions a sample is long; more of them teach more
CHECK_EVERY = 50  # steps
PATIENCE = 12  # checks without a better one


@dataclass(slots=True)
class AdapterSettings:
    """What a run is made of."""

    directory: Path
    kind: str = "lightweight"
    loss: str | None = None  # the kind's own where not given
    minutes: float = 2.0
    steps: int | None = None  # instead of minutes
    seed: int = 0
    resume: bool = False
    device: str = "cpu"
    command: str = "specfuse train adapter"

    def named_loss(self) -> str:
        """The loss, or what goes with the kind."""
        return self.loss or {"token-alignment": "kl", "compression": "tokens"}.get(self.kind, "feature")

    def check(self) -> None:
        """Raises what :func:`train_adapter` says about directory, kind, loss and minutes."""
        check_run(self.directory, self.minutes, self.resume)
        for name, value, known in (("kind", self.kind, KINDS), ("loss", self.named_loss(), LOSSES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


@dataclass(slots=True)
class EndingBudget(Budget):
    """A budget that early stopping can end."""

    ended: bool = False

    def share(self, step: int, seconds: float) -> float:
        """How much of it is used, 0 to 1; all of it once ended."""
        return 1.0 if self.ended else Budget.share(self, step, seconds)


@dataclass(slots=True)
class Checks:
    """What validation has said so far."""

    scores: list[float] = field(default_factory=list)  # the untrained adapter's first
    best: int = 0  # which of them is the best
    ended: bool = False

    def add(self, score: float) -> bool:
        """Notes a score; whether it is the best so far."""
        self.scores.append(score)
        if score > self.scores[self.best] or len(self.scores) == 1:
            self.best = len(self.scores) - 1
            return True
        self.ended = len(self.scores) - 1 - self.best >= PATIENCE
        return False


class AdapterTraining:
    """The adapter and the state of one run; what counts is the adapter of the best check."""

    def __init__(self, settings: AdapterSettings, pairs: Pairs):
        self.settings, self.pairs = settings, pairs
        self.loss = settings.named_loss()
        self.adapter = build_adapter(settings.kind, pairs, settings.seed).to(settings.device)
        self.loss_of = make_loss(self.loss, self.adapter, pairs)
        self.train, self.validation = pairs.part("train"), pairs.part("validation")
        groups = [{"params": list(self.adapter.parameters()), "rate": RATES.get(settings.kind, RATE)}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=WEIGHT_DECAY)
        self.progress, self.checks = Progress(), Checks()
        self.best = copy.deepcopy(self.adapter.state_dict())

    @property
    def identity(self) -> dict[str, Any]:
        """What a state must agree about to be resumed."""
        pairs = self.pairs
        return {
            "kind": self.settings.kind,
            "loss": self.loss,
            "seed": self.settings.seed,
            "features": pairs.features,
            "about": pairs.about,
            "source": list(pairs.source.shape),
            "target": list(pairs.target.shape),
        }

    def save(self) -> None:
        """Writes the state into the directory."""
        state = {
            "settings": self.identity,
            "adapter": self.adapter.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "checks": asdict(self.checks),
        }
        write_state(self.settings.directory / STATE, state)

    def load(self) -> None:
        """Reads the state from the directory; raises what ``specfuse.train.loop.read_state`` does."""
        path = self.settings.directory / STATE
        state = read_state(path, self.identity)
        try:
            self.adapter.load_state_dict(state["adapter"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress, self.checks = Progress(**state["progress"]), Checks(**state["checks"])
            self.best = state["best"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} does not fit this adapter: {str(error).splitlines()[0]}") from None

    def run(self, report: Report) -> None:
        """Trains until the budget is used or validation no longer gets better."""
        budget = EndingBudget(60 * self.settings.minutes, self.settings.steps, self.checks.ended)
        if not self.checks.scores:
            self._check(budget)
        largest = SMALL_BATCHES.get(self.settings.kind, LARGEST_BATCH)
        fitting = max(SMALLEST_BATCH, BATCH_NUMBERS // self.pairs.target[0].numel())
        size = min(largest, fitting, len(self.train))

        def loss_at(step: int, share: float) -> Tensor:
            self.adapter.train()
            draw = generator(self.settings.seed, 7, step)
            chosen = torch.from_numpy(draw.integers(len(self.train), size=size))
            # Dropout of a step is the same whether or not the run was interrupted before it.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(draw.integers(2**31)))
                return self.loss_of(self.train[chosen])

        def tell(progress: Progress, share: float) -> None:
            if progress.step % CHECK_EVERY == 0 or share >= 1:
                self._check(budget)
            best = self.checks.scores[self.checks.best]
            loss = np.mean(progress.losses[-50:])
            report("adapter", share, f"step {progress.step}, loss {loss:.3f}, validation {best:.4f}")

        run_stage(self.optimizer, loss_at, budget, self.progress, self.save, tell)
        self.adapter.load_state_dict(self.best)
        self.adapter.eval()

    def _check(self, budget: EndingBudget) -> None:
        self.adapter.eval()
        if self.checks.add(validation_score(self.adapter, self.loss, self.pairs, self.validation)):
            self.best = copy.deepcopy(self.adapter.state_dict())
        budget.ended = self.checks.ended


def train_adapter(
    settings: AdapterSettings, pairs: Pairs, report: Report = lambda stage, share, text: None
) -> dict[str, Any]:
    """Trains, writes the adapter's directory and measures it on what was held out.

    Args:
        settings: what to train, where and for how long.
        pairs: features of both models.
        report: is told about progress.

    Returns:
        The figures in ``alignment.json``, see :func:`specfuse.train.adapter_report.align_report`.

    Raises:
        FileExistsError: the directory holds files and ``resume`` is not set.
        FileNotFoundError: ``resume`` is set and there is nothing to resume.
        ValueError: a kind, loss or pairs that do not go together; a state of another run.
    """
    settings.check()
    training = AdapterTraining(settings, pairs)
    if settings.resume:
        training.load()
    directory = settings.directory
    directory.mkdir(parents=True, exist_ok=True)
    training.run(report)
    training.adapter.save_pretrained(directory)
    figures = align_report(training.adapter, pairs)
    figures["training"] = {
        "loss": training.loss,
        "seed": settings.seed,
        "steps": training.progress.step,
        "seconds": round(training.progress.seconds, 1),
        "best_step": min(training.checks.best * CHECK_EVERY, training.progress.step),
        "stopped_early": training.checks.ended,
        "validation": round(training.checks.scores[training.checks.best], 4),
    }
    (directory / ABOUT).write_text(json.dumps(figures, indent=2) + "\n")
    write_adapter_card(directory, figures, settings.command)
    write_adapter_curves(directory, training.progress.losses, training.checks.scores, CHECK_EVERY)
    return figures


def trained_features(directory: Path) -> str:
    """Which features an adapter was trained on, as its directory says; "pooled" where it does not.

    Raises:
        ValueError: a broken ``alignment.json``.
    """
    path = directory / ABOUT
    if not path.exists():
        return "pooled"
    try:
        return str(json.loads(path.read_text())["features"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is broken: {error}") from None
