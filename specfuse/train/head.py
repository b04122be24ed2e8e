"""Trains a drafting head on what a target says: ``specfuse train head``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from specfuse.data.world import WORLD_SEED
from specfuse.drafters import DraftHead, HeadConfig
from specfuse.models.checkpoint import load_video_llava
from specfuse.train.card import write_curves, write_head_card
from specfuse.train.head_batches import EventFeatures, Teacher
from specfuse.train.head_loss import head_loss
from specfuse.train.head_report import MakeGenerator, measure
from specfuse.train.loop import STATE, Budget, Progress, Report, RunSettings, RunState, check_run, run_stage
from specfuse.train.outputs import weights_digest, world_outputs

if TYPE_CHECKING:
    from transformers import VideoLlavaForConditionalGeneration

WEIGHT_DECAY = 0.01


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """The size of a head and of its training."""

    pool: int  # first clips of the training split,
    train_clips: int  # of which those whose answers are learned from are spread evenly
    held_out_clips: int
    heads: int
    inner: int
    levels: int  # that the head is unrolled to
    clips: int  # of a batch
    rows: int  # answers about each
    rate: float
    minutes: float


PLANS = {
    "tiny": HeadPlan(4166, 600, 40, heads=4, inner=256, levels=4, clips=4, rows=10, rate=2e-3, minutes=12.0),
    "micro": HeadPlan(12, 12, 2, heads=2, inner=32, levels=3, clips=2, rows=4, rate=1e-2, minutes=0.1),
}


@dataclass(slots=True, kw_only=True)
class HeadSettings(RunSettings):
    """What a run is made of."""

    plan: HeadPlan
    events: EventFeatures | None = None
    event_width: int = 0
    command: str = "specfuse train head"


class HeadTraining:
    """The head and the state of one run."""

    def __init__(self, settings: HeadSettings, model: VideoLlavaForConditionalGeneration, shortlist: Tensor):
        self.settings, self.model = settings, model
        text, plan = model.config.get_text_config(), settings.plan
        config = HeadConfig(
            text.hidden_size,
            text.vocab_size,
            plan.heads,
            plan.inner,
            event_width=settings.event_width,
            shortlist=len(shortlist),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.head = DraftHead(config)
        self.head.shortlist = shortlist
        self.head.to(model.device)
        groups = [{"params": list(self.head.parameters()), "rate": plan.rate}]
        optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
        identity = {
            "seed": settings.seed,
            "world": WORLD_SEED,
            "weights": weights_digest(model),
            "event_width": settings.event_width,
            **asdict(plan),
        }
        modules = {"head": self.head}
        self.state = RunState(settings.directory / STATE, identity, modules, optimizer, settings.minutes)

    def run(self, teacher: Teacher, report: Report) -> None:
        """Trains until the budget is used."""
        settings, plan, state = self.settings, self.settings.plan, self.state

        def loss_at(step: int, share: float) -> Tensor:
            rows = teacher.at(settings.seed, step, plan.clips, plan.rows)
            return head_loss(self.head, self.model, rows, plan.levels)

        def tell(progress: Progress, share: float) -> None:
            report("head", share, f"step {progress.step}, loss {np.mean(progress.losses[-50:]):.3f}")

        self.head.train()
        budget = Budget(60 * (state.minutes or plan.minutes), settings.steps)
        run_stage(state.optimizer, loss_at, budget, state.progress, state.save, tell)


def train_head(
    settings: HeadSettings, generator: MakeGenerator, report: Report = lambda stage, share, text: None
) -> dict[str, Any]:
    """Trains a head on the target's own outputs, writes its directory and measures it on held-out clips.

    Args:
        settings: what to train, for whom, where and for how long.
        generator: ``specfuse.SpeculativeGenerator``, that it is measured with.
        report: is told about progress.

    Returns:
        The figures in ``figures.json``: see ``specfuse.train.head_report.measure``.

    Raises:
        FileExistsError, FileNotFoundError: as ``specfuse.train.loop.check_run``, or no target.
        ValueError: a broken target, or a state to resume that is broken or belongs to other settings.
    """
    directory = settings.directory
    check_run(directory, settings.minutes, settings.resume)
    model, processor = load_video_llava(settings.target, dtype=torch.float32, device=settings.device)
    model.requires_grad_(False)
    plan = settings.plan
    learned = plan.train_clips
    clips, outputs = world_outputs(
        model, processor.tokenizer, plan.pool, (learned, plan.held_out_clips), settings.cache, report
    )
    seen = set(clips.indices[:learned].tolist())
    # What the target never says to a thousand questions it will rarely say: drafting it is not worth a row.
    said = {token for output in outputs if output.clip in seen for token in output.tokens}
    training = HeadTraining(settings, model, torch.tensor(sorted(said)))
    if settings.resume:
        training.state.load()
    directory.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(model, processor.tokenizer, clips, outputs, settings.events)
    teacher.clips = [clip for clip in teacher.clips if clip in seen]
    training.run(teacher, report)
    training.head.eval().save_pretrained(directory)
    # What is measured is what was written.
    head = DraftHead.from_pretrained(directory).to(model.device)
    held_out = [output for output in outputs if output.clip not in seen]
    figures = measure(
        head,
        teacher,
        processor.tokenizer,
        clips,
        held_out,
        generator,
        lambda share: report("held out", share, "drafting"),
    )
    progress = training.state.progress
    figures |= {"steps": progress.step, "minutes": round(progress.seconds / 60, 2)}
    (directory / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    events = ", fused with features of events" if settings.event_width else ""
    about = {
        "command": settings.command,
        "seed": settings.seed,
        "train_clips": learned,
        "events": events,
    }
    write_head_card(directory, figures, about)
    write_curves(directory, {"head": progress})
    return figures
