"""``specfuse train``: makes the miniature models from the driving world."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

from specfuse.cli import UserError, pick_device, print_json

MODELS = ("target",)


def train(
    model: str = typer.Argument(..., help=f"What to train: {', '.join(MODELS)}."),
    out: Path = typer.Option(..., help="Directory to write; created if missing."),
    preset: str = typer.Option("tiny", help="Size: tiny, or micro for a try of seconds."),
    minutes: float | None = typer.Option(
        None, help="Training time at most; the preset's where not given.", min=0.0
    ),
    seed: int = typer.Option(0, help="Seed of weights and batches."),
    resume: bool = typer.Option(False, "--resume", help="Continue the training in --out."),
    cache: Path | None = typer.Option(None, help="Where drawn clips are kept (600 MB for tiny)."),
    device: str = typer.Option("auto", help="cpu, cuda, ...; auto takes the GPU where there is one."),
    json: bool = typer.Option(False, "--json", help="Print the accuracy as JSON, alone on stdout."),
) -> None:
    """Train a small Video-LLaVA on the procedural driving world and measure it on held-out clips."""
    if model not in MODELS:
        raise UserError(f"MODEL must be one of {', '.join(MODELS)}, got {model!r}")
    from specfuse.train.presets import preset as find
    from specfuse.train.target import Settings, train_target

    settings = Settings(
        directory=out,
        preset=find(preset),
        cache=cache or _default_cache(),
        minutes=minutes,
        seed=seed,
        resume=resume,
        device=str(pick_device(device)),
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _progress() as bars:
        accuracy = train_target(settings, bars)
    if json:
        print_json(accuracy.as_dict())
        return
    for kind, share in accuracy.as_dict().items():
        print(f"{kind:16} {share:.1%}" if isinstance(share, float) else f"{kind:16} {share}")
    print(f"try: specfuse generate --model {out} --video CLIP --question 'What is the weather like?'")


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "specfuse" / "world"


class _progress:
    """One bar for each stage on stderr; called with stage, share done and a text."""

    def __enter__(self) -> _progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:9}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._tasks: dict[str, Any] = {}
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._bars.stop()

    def __call__(self, stage: str, share: float, text: str) -> None:
        if stage not in self._tasks:
            # Not before there is something to show: an error is one line alone.
            self._bars.start()
            self._tasks[stage] = self._bars.add_task(stage, total=1.0, text=text)
        self._bars.update(self._tasks[stage], completed=share, text=text)
