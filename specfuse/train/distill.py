"""A drafter learns what its target says: ``specfuse train distill``.

Trained on short answers of its own, an EventGPT drafts tokens that the target rarely says. Here it sees the
target's answers and the distributions behind every token of them, with nothing but events to look at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specfuse.data.world import WORLD_SEED
from specfuse.drafters.vocabulary import check_same_tokens
from specfuse.models.checkpoint import load_eventgpt, load_video_llava
from specfuse.train.acceptance import chain_figures
from specfuse.train.batches import pixels
from specfuse.train.card import write_curves, write_distill_card
from specfuse.train.drafter import event_start, read_events
from specfuse.train.event_store import load_event_pictures
from specfuse.train.head_batches import HeadRows, Teacher
from specfuse.train.language import repeat_cache, text_states
from specfuse.train.loop import STATE, Budget, Progress, Report, RunSettings, RunState, check_run, run_stage
from specfuse.train.outputs import Output, weights_digest, world_outputs
from specfuse.train.vision import read_last_layer

if TYPE_CHECKING:
    from specfuse.models.eventgpt import EventGptForConditionalGeneration

WEIGHT_DECAY = 0.02
TOKEN_WEIGHT = 0.3  # of the target's own tokens, beside the distributions that they were taken from
STATE_WEIGHT = 0.2  # of the distance between hidden states


@dataclass(frozen=True, slots=True)
class DistillPlan:
    """The size of a distillation."""

    pool: int  # first clips of the training split,
    train_clips: int  # of which those whose answers are learned from are spread evenly
    held_out_clips: int
    clips: int  # of a batch
    rows: int  # answers about each
    rate: float
    minutes: float


PLANS = {
    "tiny": DistillPlan(4166, 600, 40, clips=6, rows=8, rate=1.5e-3, minutes=10.0),
    "micro": DistillPlan(12, 12, 2, clips=2, rows=4, rate=1e-2, minutes=0.1),
}


@dataclass(slots=True, kw_only=True)
class DistillSettings(RunSettings):
    """What a run is made of."""

    drafter: Path
    plan: DistillPlan
    command: str = "specfuse train distill"


class DistillTraining:
    """The drafter in training; its tower stays as it is."""

    def __init__(self, settings: DistillSettings, target: Any, drafter: EventGptForConditionalGeneration):
        self.settings, self.target, self.drafter = settings, target, drafter
        widths = [model.config.get_text_config().hidden_size for model in (drafter, target)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.to_target = nn.Linear(*widths).to(target.device)
        drafter.model.visual_tower.requires_grad_(False)
        learning = [p for p in drafter.parameters() if p.requires_grad] + list(self.to_target.parameters())
        groups = [{"params": learning, "rate": settings.plan.rate}]
        optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
        identity = {
            "seed": settings.seed,
            "world": WORLD_SEED,
            "weights": weights_digest(target),
            "drafter": weights_digest(drafter),
            **asdict(settings.plan),
        }
        modules: dict[str, nn.Module] = {"drafter": drafter, "to_target": self.to_target}
        self.state = RunState(settings.directory / STATE, identity, modules, optimizer, settings.minutes)

    def run(self, teacher: Teacher, start: list[int], report: Report) -> None:
        """Trains until the budget is used."""
        settings, plan, state = self.settings, self.settings.plan, self.state

        def loss_at(step: int, share: float) -> Tensor:
            rows = teacher.at(settings.seed, step, plan.clips, plan.rows)
            return distill_loss(self.drafter, self.target, self.to_target, start, rows, plan.rows)

        def tell(progress: Progress, share: float) -> None:
            report("distill", share, f"step {progress.step}, loss {np.mean(progress.losses[-50:]):.3f}")

        self.drafter.train()
        budget = Budget(60 * (state.minutes or plan.minutes), settings.steps)
        run_stage(state.optimizer, loss_at, budget, state.progress, state.save, tell)


def distill_loss(
    drafter: EventGptForConditionalGeneration,
    target: Any,
    to_target: nn.Module,
    start: list[int],
    rows: HeadRows,
    each: int,
) -> Tensor:
    """Divergence from the target's distributions, loss of its tokens, distance from its hidden states.

    Args:
        drafter: in training.
        target: whose answers the rows are.
        to_target: states of the drafter to the width of the target's.
        start: tokens as from ``event_start``.
        rows: with the tower's states ``[M, 5 * 65, D]`` for events.
        each: rows about one clip.
    """
    states, said = drafter_states(drafter, start, rows, each)
    known = rows.states[said]
    wanted = target.get_output_embeddings()(known).log_softmax(-1)
    # The drafter has ids of its own behind the target's; whatever it gives to them is lost.
    found = drafter.lm_head(states[said]).log_softmax(-1)[:, : wanted.shape[1]]
    divergence = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    tokens = F.nll_loss(found, rows.tokens[:, 1:][said])
    apart = 1 - F.cosine_similarity(to_target(states[said]), known, dim=-1).mean()
    return divergence + TOKEN_WEIGHT * tokens + STATE_WEIGHT * apart


def drafter_states(
    drafter: EventGptForConditionalGeneration, start: list[int], rows: HeadRows, each: int
) -> tuple[Tensor, Tensor]:
    """The drafter's states ``[M, T - 1, D]`` along rows, and where they predict tokens of an answer."""
    if rows.events is None:
        raise ValueError("rows must hold the tower's states for events, got None")
    once, _ = read_events(drafter, start, rows.events[::each])
    states = text_states(drafter, repeat_cache(once, each), len(start), rows.tokens[:, :-1])
    places = torch.arange(states.shape[1], device=states.device)
    return states, (places >= rows.first[:, None] - 1) & (places < rows.lengths[:, None] - 1)


@torch.no_grad()
def draft_hits(
    drafter: EventGptForConditionalGeneration, start: list[int], teacher: Teacher, clip: int
) -> list[list[bool]]:
    """For every answer about a clip, whether the drafter's first choice is the target's, token by token."""
    rows = teacher.about(clip)
    states, said = drafter_states(drafter, start, rows, len(rows.tokens))
    right = drafter.lm_head(states).argmax(-1) == rows.tokens[:, 1:]
    return [row[where].tolist() for row, where in zip(right, said, strict=True)]


def train_distill(
    settings: DistillSettings, report: Report = lambda stage, share, text: None
) -> dict[str, Any]:
    """Trains a drafter on what a target says, writes its directory and measures it on held-out clips.

    Args:
        settings: which drafter and target, where and for how long.
        report: is told about progress.

    Returns:
        The figures in ``figures.json``: those of ``specfuse.train.acceptance.chain_figures`` for held-out
        answers of the target, each ``before`` and ``after``.

    Raises:
        FileExistsError, FileNotFoundError: as ``specfuse.train.loop.check_run``, or no target or drafter.
        ValueError: a broken target or drafter, two that do not share their tokens, or a state to resume that
            is broken or belongs to other settings.
    """
    directory, plan = settings.directory, settings.plan
    check_run(directory, settings.minutes, settings.resume)
    target, processor = load_video_llava(settings.target, dtype=torch.float32, device=settings.device)
    drafter, own = load_eventgpt(settings.drafter, dtype=torch.float32, device=settings.device)
    check_same_tokens(processor.tokenizer, own.tokenizer)
    target.requires_grad_(False)
    training = DistillTraining(settings, target, drafter)
    clips, outputs = world_outputs(
        target,
        processor.tokenizer,
        plan.pool,
        (plan.train_clips, plan.held_out_clips),
        settings.cache,
        report,
    )
    directory.mkdir(parents=True, exist_ok=True)
    seen = set(clips.indices[: plan.train_clips].tolist())
    teacher = Teacher(target, processor.tokenizer, clips, outputs, tower_states(drafter, settings.cache))
    held_out = [clip for clip in teacher.clips if clip not in seen]
    teacher.clips = [clip for clip in teacher.clips if clip in seen]
    start = event_start(drafter, own.tokenizer)
    before = _measure(training, teacher, start, held_out, outputs, report, "before")
    if settings.resume:
        training.state.load()
    training.run(teacher, start, report)
    drafter.eval()
    halves = {name: value.half() for name, value in drafter.state_dict().items()}
    drafter.save_pretrained(directory, state_dict=halves)
    own.save_pretrained(directory)
    # What is measured is what was written.
    drafter.load_state_dict({name: value.float() for name, value in halves.items()})
    figures = before | _measure(training, teacher, start, held_out, outputs, report, "after")
    progress = training.state.progress
    figures |= {"clips": len(held_out), "steps": progress.step, "minutes": round(progress.seconds / 60, 2)}
    (directory / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    about = {"command": settings.command, "seed": settings.seed, "train_clips": plan.train_clips}
    write_distill_card(directory, figures, about)
    write_curves(directory, {"distill": progress})
    return figures


def tower_states(drafter: EventGptForConditionalGeneration, cache: Path) -> Callable[[Sequence[int]], Tensor]:
    """Clips of the world, by index, to what the drafter's tower says of their events ``[C, 5 * 65, D]``."""

    @torch.no_grad()
    def states(indices: Sequence[int]) -> Tensor:
        pictures = pixels(load_event_pictures(indices, cache)).to(drafter.device)
        seen = read_last_layer(drafter.model.visual_tower, pictures.flatten(0, 1))
        return seen.unflatten(0, pictures.shape[:2]).flatten(1, 2)

    return states


def _measure(
    training: DistillTraining,
    teacher: Teacher,
    start: list[int],
    clips: Sequence[int],
    outputs: Sequence[Output],
    report: Report,
    when: str,
) -> dict[str, Any]:
    training.drafter.eval()
    hits: list[list[bool]] = []
    for index, clip in enumerate(clips):
        hits += draft_hits(training.drafter, start, teacher, clip)
        report(f"{when}", (index + 1) / len(clips), f"{len(hits)} answers")
    return {f"{name}_{when}": value for name, value in chain_figures(hits).items()}
