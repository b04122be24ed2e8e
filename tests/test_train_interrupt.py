"""Ctrl-C in training: the step in progress is finished and saved, and signals are handled as before."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

import pytest
import torch

from specfuse.cli import main
from specfuse.train import loop


@pytest.fixture
def handler() -> Iterator[object]:
    """Python's own handler, whatever pytest was started with."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


class Run:
    """A stage of a few steps, interrupted inside the loss of step ``at``, ``times`` times."""

    def __init__(self, at: int | None = None, times: int = 1):
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.at, self.times = at, times
        self.progress = loop.Progress()
        self.saved: list[tuple[int, list[float]]] = []

    def loss_at(self, step: int, share: float) -> torch.Tensor:
        if step == self.at:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
        return self.weight.square().sum()

    def save(self) -> None:
        self.saved.append((self.progress.step, self.weight.tolist()))

    def __call__(self) -> None:
        optimizer = torch.optim.AdamW([{"params": [self.weight], "rate": 0.1}])
        budget = loop.Budget(1.0, 4)
        loop.run_stage(
            optimizer, self.loss_at, budget, self.progress, self.save, lambda progress, share: None
        )


def test_an_interrupted_step_is_finished_and_saved(handler: object, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(at=1)
    with pytest.raises(KeyboardInterrupt, match="the state is saved, --resume continues"):
        run()
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
    whole = Run()
    whole()
    assert run.saved == whole.saved[1:2] and run.saved[0][0] == 2


def test_a_second_interrupt_ends_it_at_once(handler: object) -> None:
    run = Run(at=1, times=2)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert run.saved == [] and run.progress.step == 1
    assert signal.getsignal(signal.SIGINT) is handler


def test_ignored_signals_and_other_threads_stay_as_they_are(handler: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = Run(at=1)
    run()
    assert run.progress.step == 4 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    elsewhere = Run()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert elsewhere.progress.step == 4


@pytest.mark.parametrize("text", ["interrupted; the state is saved", ""])
def test_the_command_says_how_to_go_on(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> NoReturn:
        raise KeyboardInterrupt(*([text] if text else []))

    monkeypatch.setattr("specfuse.doctor.diagnose", stopped)
    assert main.run(["doctor", "--json"]) == 130
    assert capsys.readouterr().err == f"specfuse: error: {text or 'interrupted'}\n"
