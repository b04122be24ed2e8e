"""``specfuse train``: makes the miniature models from the driving world."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from specfuse.cli import UserError, pick_device, print_json, shipped_or_given

if TYPE_CHECKING:
    from specfuse.train.presets import Preset
    from specfuse.train.training import Settings


@dataclass(frozen=True, slots=True)
class Request:
    """The options of the command line."""

    out: Path
    preset: Preset
    cache: Path
    minutes: float | None
    seed: int
    resume: bool
    device: str
    target: Path | None
    drafter: Path | None = None
    pairs: Path | None = None
    kind: str | None = None
    features: str | None = None
    loss: str | None = None
    events: Path | None = None

    def needed_target(self) -> Path:
        """The directory of --target.

        Raises:
            UserError: it was not given.
        """
        if self.target is None:
            raise UserError("--target must be the directory of the trained target")
        return self.target

    def run(self) -> dict[str, Any]:
        """What every training is told about its run."""
        names = ("cache", "minutes", "seed", "resume", "device")
        return {"directory": self.out} | {name: getattr(self, name) for name in names}

    def command(self, start: str) -> str:
        """The command line for a card, beginning with what is trained."""
        minutes = "" if self.minutes is None else f" --minutes {self.minutes:g}"
        return f"specfuse train {start} --preset {self.preset.name}{minutes} --seed {self.seed} --out DIR"


Report = Callable[[str, float, str], None]  # stage, share done, what to show


def _target(request: Request, report: Report) -> dict[str, Any]:
    from specfuse.train.target import train_target

    return train_target(_settings(request, request.preset), report).as_dict()


def _drafter(request: Request, report: Report) -> dict[str, Any]:
    from specfuse.train.drafter import drafter_preset, train_drafter

    settings = _settings(request, drafter_preset(request.preset))
    return train_drafter(settings, request.target, report).as_dict()


def _settings(request: Request, preset: Preset) -> Settings:
    """Of a model that learns to see and then to answer."""
    from specfuse.train.training import Settings

    return Settings(preset=preset, **request.run())


def _distill(request: Request, report: Report) -> dict[str, Any]:
    from specfuse.train.distill import PLANS, DistillSettings, train_distill

    if request.drafter is None:
        raise UserError("--drafter must be the directory of a trained drafter")
    settings = DistillSettings(
        target=request.needed_target(),
        drafter=request.drafter,
        plan=PLANS[request.preset.name],
        command=request.command("distill --target TARGET --drafter DRAFTER"),
        **request.run(),
    )
    return train_distill(settings, report)


def _corpus(request: Request, report: Report) -> dict[str, Any]:
    from specfuse.train.corpus import CorpusSettings, train_corpus

    settings = CorpusSettings(
        directory=request.out,
        target=request.needed_target(),
        preset=request.preset,
        cache=request.cache,
        device=request.device,
    )
    return train_corpus(settings, report)


def _head(request: Request, report: Report) -> dict[str, Any]:
    from specfuse.generate import SpeculativeGenerator
    from specfuse.train.head import PLANS, HeadSettings, train_head

    with_events = "" if request.events is None else " --events EVENTGPT"
    encoder = None
    if request.events is not None:
        from specfuse.train.event_features import event_encoder

        encoder = event_encoder(request.events, request.cache, request.device)
    settings = HeadSettings(
        target=request.needed_target(),
        plan=PLANS[request.preset.name],
        command=request.command(f"head --target TARGET{with_events}"),
        events=encoder and encoder.features,
        event_width=encoder.width if encoder else 0,
        **request.run(),
    )
    return train_head(settings, SpeculativeGenerator, report)


def _adapter(request: Request, report: Report) -> dict[str, Any]:
    from specfuse.train.adapter import AdapterSettings, train_adapter
    from specfuse.train.adapter_report import summary
    from specfuse.train.adapter_source import FEATURES_OF, open_pairs

    kind = request.kind or "lightweight"
    features = request.features or FEATURES_OF.get(kind, "pooled")
    if request.pairs is not None and request.features is not None:
        raise UserError("--features says what models are asked for; what --pairs holds is in the file")
    named = {"kind": kind, "features": request.features, "loss": request.loss}
    given = [f" --{name} {value}" for name, value in named.items() if value is not None]
    models = "--pairs FILE" if request.pairs else "--target DIR --drafter DIR"
    run = request.run()
    run.pop("cache")
    run["minutes"] = min(2.0, request.preset.minutes) if request.minutes is None else request.minutes
    command = request.command(f"adapter {models}{''.join(given)}")
    settings = AdapterSettings(kind=kind, loss=request.loss, command=command, **run)
    settings.check()
    pairs = open_pairs(
        request.pairs,
        request.target,
        request.drafter,
        features,
        request.preset,
        request.cache,
        request.device,
        report,
    )
    return summary(train_adapter(settings, pairs, report))


# What can be trained: a function that trains it and gives back its figures, and what to try next.
MODELS: dict[str, tuple[Callable[[Request, Report], dict[str, Any]], str]] = {
    "target": (
        _target,
        "specfuse generate --model {out} --video CLIP --question 'What is the weather like?'",
    ),
    "drafter": (_drafter, "specfuse train distill --target {target} --drafter {out} --out DIR"),
    "distill": (
        _distill,
        "specfuse.EventDrafter(*load_eventgpt('{out}'), target_processor), see {out}/README.md",
    ),
    "head": (
        _head,
        "specfuse generate --model {target} --drafter {out} --video CLIP --question 'What is happening?'",
    ),
    "adapter": (_adapter, "specfuse align report --adapter {out} with the same --pairs, or models"),
    "corpus": (_corpus, "specfuse demo --model {target} --corpus {out}/answers.safetensors"),
}

# Options that only some trainings take.
TAKEN = {
    "target": ("drafter", "distill", "head", "adapter", "corpus"),
    "drafter": ("distill", "adapter"),
    "pairs": ("adapter",),
    "kind": ("adapter",),
    "features": ("adapter",),
    "loss": ("adapter",),
    "events": ("head",),
    "minutes": ("target", "drafter", "distill", "head", "adapter"),
    "resume": ("target", "drafter", "distill", "head", "adapter"),
}


def _refuse_unused(model: str, request: Request) -> None:
    for option, models in TAKEN.items():
        if model not in models and getattr(request, option) not in (None, False):
            raise UserError(f"--{option} is for train {', '.join(models)}; train {model} does not take it")


def train(
    model: str = typer.Argument(..., help=f"What to train: {', '.join(MODELS)}."),
    out: Path = typer.Option(..., help="Directory to write; created if missing."),
    target: Path | None = typer.Option(
        None, help="Directory of the trained target, for what learns from it."
    ),
    drafter: Path | None = typer.Option(
        None, help="Directory of the trained drafter, for what learns from it."
    ),
    pairs: Path | None = typer.Option(None, help="adapter: features of both models instead (safetensors)."),
    kind: str | None = typer.Option(
        None, help="adapter: which, lightweight if not given; an unknown one lists them."
    ),
    features: str | None = typer.Option(None, help="adapter: which features; an unknown one lists them."),
    loss: str | None = typer.Option(None, help="adapter: feature (MSE + 0.5 (1 - cos)), contrastive or kl."),
    events: Path | None = typer.Option(
        None, help="head: directory of an EventGPT whose features of events it is fused with."
    ),
    preset: str = typer.Option("tiny", help="Size: tiny, or micro for a try of seconds."),
    minutes: float | None = typer.Option(
        None, help="Training time at most; the preset's where not given.", min=0.0
    ),
    seed: int = typer.Option(0, help="Seed of weights and batches."),
    resume: bool = typer.Option(False, "--resume", help="Continue the training in --out."),
    cache: Path | None = typer.Option(None, help="Where drawn clips are kept (600 MB for tiny)."),
    device: str = typer.Option("auto", help="cpu, cuda, ...; auto takes the GPU where there is one."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON, alone on stdout."),
) -> None:
    """Train a miniature model on the procedural driving world and measure it on held-out clips."""
    if model not in MODELS:
        raise UserError(f"MODEL must be one of {', '.join(MODELS)}, got {model!r}")
    if seed < 0:
        raise UserError(f"--seed must be 0 or above, got {seed}")
    from transformers.utils import logging

    from specfuse.train.presets import preset as find

    request = Request(
        out=out,
        preset=find(preset),
        cache=cache or default_cache(),
        minutes=minutes,
        seed=seed,
        resume=resume,
        device=str(pick_device(device)),
        target=shipped_or_given(target),
        drafter=shipped_or_given(drafter),
        pairs=pairs,
        kind=kind,
        features=features,
        loss=loss,
        events=shipped_or_given(events),
    )
    _refuse_unused(model, request)
    logging.set_verbosity_error()  # an error is one line alone
    logging.disable_progress_bar()
    run, hint = MODELS[model]
    with progress() as bars:
        figures = run(request, bars)
    if json:
        print_json(figures)
        return
    for name, value in figures.items():
        print(f"{name:16} {shown(name, value)}")
    print("try: " + hint.format(out=out, target=target or "TARGET"))


def shown(name: str, value: Any) -> str:
    """A figure as text: most numbers up to 1 are shares."""
    if not isinstance(value, float):
        return str(value)
    share = value <= 1 and not any(unit in name for unit in ("minutes", "seconds", "loss", "per_pass"))
    return f"{value:.1%}" if share else f"{value:.2f}"


def default_cache() -> Path:
    """Where drawn clips are kept unless --cache says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "specfuse" / "world"


class progress:
    """One bar for each stage on stderr; called with stage, share done and a text."""

    def __enter__(self) -> progress:
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
