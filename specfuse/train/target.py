"""Trains a small Video-LLaVA on the driving world: ``specfuse train target``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from specfuse.data.world import WORLD_SEED, split
from specfuse.train.build import build_model, build_processor
from specfuse.train.card import write_card, write_curves
from specfuse.train.clip_store import Clips, load_clips
from specfuse.train.evaluate import Accuracy, answer_greedily, evaluate
from specfuse.train.language import Features, LanguageBatches, answer_loss
from specfuse.train.loop import STATE, Budget, Progress, Report, check_run, read_state, run_stage, write_state
from specfuse.train.presets import Preset
from specfuse.train.tokenizer import train_tokenizer
from specfuse.train.vision import Heads, facts_loss, vision_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WEIGHT_DECAY = 0.05
FACTS_WEIGHT = 0.1  # twenty facts to one answer
TOWER_SLOWER = 0.1  # the tower's learning rate in stage 2, as a share of the language model's


@dataclass(slots=True)
class Settings:
    """What a run is made of."""

    directory: Path
    preset: Preset
    cache: Path  # of drawn clips
    minutes: float | None = None
    steps: tuple[int, int] | None = None  # of the two stages, instead of minutes
    seed: int = 0
    resume: bool = False
    device: str = "cpu"


class TargetTraining:
    """The models and the state of one run."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerFast, clips: Clips):
        self.settings, self.tokenizer, self.clips = settings, tokenizer, clips
        preset = settings.preset
        self.model = build_model(preset, tokenizer, settings.seed).to(settings.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed + 1)
            self.heads = Heads(preset.vision_width).to(settings.device)
            self.text_heads = Heads(preset.text_width).to(settings.device)
        self.progress = {"vision": Progress(), "language": Progress()}
        self.tower = self.model.model.video_tower
        self.optimizer = self._optimizer("vision")

    @property
    def identity(self) -> dict[str, Any]:
        """What a state must agree about to be resumed."""
        return {"seed": self.settings.seed, "world": WORLD_SEED, **asdict(self.settings.preset)}

    def save(self) -> None:
        """Writes the state into the directory."""
        state = {
            "settings": self.identity,
            "minutes": self.settings.minutes,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "text_heads": self.text_heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {name: asdict(progress) for name, progress in self.progress.items()},
        }
        write_state(self.settings.directory / STATE, state)

    def load(self) -> None:
        """Reads the state from the directory; raises what ``specfuse.train.loop.read_state`` does."""
        path = self.settings.directory / STATE
        state = read_state(path, self.identity)
        try:
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            self.text_heads.load_state_dict(state["text_heads"])
            self.progress = {name: Progress(**fields) for name, fields in state["progress"].items()}
            self.optimizer = self._optimizer("language" if self.progress["language"].step else "vision")
            self.optimizer.load_state_dict(state["optimizer"])
            if self.settings.minutes is None:
                self.settings.minutes = state["minutes"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} does not fit this model: {str(error).splitlines()[0]}") from None

    def vision(self, budget: Budget, report: Report) -> None:
        """Stage 1."""

        def loss_at(step: int, share: float) -> Tensor:
            return vision_loss(
                self.tower, self.heads, self.clips, self.settings.preset, self.settings.seed, step
            )

        self._run("vision", loss_at, budget, report)

    def language(self, budget: Budget, report: Report) -> None:
        """Stage 2."""
        if not self.progress["language"].step:
            self.optimizer = self._optimizer("language")
        preset = self.settings.preset
        features = Features(self.tower, self.clips)
        batches = LanguageBatches(self.tokenizer, self.clips, preset, self.settings.seed)

        def loss_at(step: int, share: float) -> Tensor:
            # Afterwards every second step: long answers teach wording far more than what is seen.
            facts_only = share < preset.facts_share or step % 2 == 1
            chosen, text = batches.at(step, facts_only=facts_only)
            seen = features.frozen(chosen) if share < preset.frozen_share else features.live(chosen)
            said, middle = answer_loss(self.model, batches.start, seen, text, batches.kept(step, share))
            # Questions find what was seen in one place, the end of the video, instead of in 520.
            facts = torch.from_numpy(self.clips.facts[chosen]).long().to(middle.device)
            known = facts_loss(self.text_heads.read_facts(middle[:, None, None]), facts)
            return said + FACTS_WEIGHT * known

        self._run("language", loss_at, budget, report)

    def _run(
        self, stage: str, loss_at: Callable[[int, float], Tensor], budget: Budget, report: Report
    ) -> None:
        def tell(progress: Progress, share: float) -> None:
            report(stage, share, f"step {progress.step}, loss {np.mean(progress.losses[-50:]):.3f}")

        self.model.train()
        run_stage(self.optimizer, loss_at, budget, self.progress[stage], self.save, tell)

    def _optimizer(self, stage: str) -> torch.optim.AdamW:
        preset = self.settings.preset
        tower = list(self.tower.parameters())
        if stage == "vision":
            groups = [{"params": [*tower, *self.heads.parameters()], "rate": preset.vision_rate}]
        else:
            inner = self.model.model
            parts = (inner.multi_modal_projector, inner.language_model, self.model.lm_head, self.text_heads)
            own = [p for part in parts for p in part.parameters()]
            slower = preset.text_rate * TOWER_SLOWER
            groups = [{"params": own, "rate": preset.text_rate}, {"params": tower, "rate": slower}]
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))


def train_target(settings: Settings, report: Report = lambda stage, share, text: None) -> Accuracy:
    """Trains, writes the model directory and measures held-out accuracy.

    Args:
        settings: what to train, where and for how long.
        report: is told about progress.

    Returns:
        Accuracy on held-out clips; also in the directory's ``README.md`` and ``accuracy.json``.

    Raises:
        FileExistsError: the directory holds files and ``resume`` is not set.
        FileNotFoundError: ``resume`` is set and there is nothing to resume.
        ValueError: the state to resume is broken or belongs to other settings.
    """
    directory, preset = settings.directory, settings.preset
    check_run(directory, settings.minutes, settings.resume)
    train, held_out = _clips(settings, report)
    tokenizer = train_tokenizer((q for asked in train.questions for q in asked), preset.vocabulary)
    training = TargetTraining(settings, tokenizer, train)
    if settings.resume:
        training.load()
    directory.mkdir(parents=True, exist_ok=True)
    first, second = _budgets(settings)
    if not training.progress["language"].step:
        training.vision(first, report)
    training.language(second, report)
    save_model(training)
    accuracy = evaluate(
        training.model,
        tokenizer,
        held_out,
        lambda n: report("held out", n / len(held_out.indices), f"{n} clips"),
    )
    _write_reports(training, accuracy, held_out)
    return accuracy


def save_model(training: TargetTraining) -> None:
    """Writes model and processor for ``from_pretrained``; weights in half precision, computed in single."""
    inner = training.model.model
    # Pictures are seen with the eyes that videos were learned with.
    inner.image_tower.load_state_dict(inner.video_tower.state_dict())
    halves = {name: value.half() for name, value in training.model.state_dict().items()}
    training.model.save_pretrained(training.settings.directory, state_dict=halves)
    build_processor(training.tokenizer).save_pretrained(training.settings.directory)


def _clips(settings: Settings, report: Report) -> tuple[Clips, Clips]:
    preset = settings.preset
    train = split("train")[: preset.train_clips]
    # Spread over all held-out drives.
    every = split("held_out")
    held_out = every[np.linspace(0, len(every) - 1, preset.held_out_clips).astype(int)]
    total = len(train) + len(held_out)

    def tell(before: int) -> Callable[[int], None]:
        return lambda n: report("clips", (before + n) / total, f"{before + n} of {total} drawn")

    return load_clips(train, settings.cache, tell(0)), load_clips(held_out, settings.cache, tell(len(train)))


def _budgets(settings: Settings) -> tuple[Budget, Budget]:
    preset = settings.preset
    seconds = 60 * (settings.minutes or preset.minutes)
    steps = settings.steps or (None, None)
    share = preset.vision_share
    return Budget(share * seconds, steps[0]), Budget((1 - share) * seconds, steps[1])


def _write_reports(training: TargetTraining, accuracy: Accuracy, held_out: Clips) -> None:
    settings = training.settings
    features = Features(training.tower, held_out)
    examples = []
    for index in range(min(3, len(held_out.indices))):
        asked = held_out.questions[index][index : index + 8 : 7]
        texts = [question.text for question in asked]
        answers = answer_greedily(training.model, training.tokenizer, features.live([index]), texts, 160)
        examples += [(q.text, answer, q.long) for q, answer in zip(asked, answers, strict=True)]
    minutes = "" if settings.minutes is None else f" --minutes {settings.minutes:g}"
    about = {
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "train_clips": len(training.clips.indices),
        "seed": settings.seed,
        "command": f"specfuse train target --preset {settings.preset.name}{minutes} --seed {settings.seed}",
    }
    vision, language = training.progress["vision"], training.progress["language"]
    write_card(settings.directory, accuracy, vision, language, examples, about)
    write_curves(settings.directory, training.progress)
    (settings.directory / "accuracy.json").write_text(json.dumps(accuracy.as_dict(), indent=2) + "\n")
