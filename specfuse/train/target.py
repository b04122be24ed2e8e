"""Trains a small Video-LLaVA on the driving world: ``specfuse train target``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from specfuse.train.build import build_model, build_processor
from specfuse.train.card import TARGET
from specfuse.train.clip_store import Clips
from specfuse.train.evaluate import Accuracy, ask_about, examine
from specfuse.train.language import Features, LanguageBatches, answer_loss
from specfuse.train.loop import STATE, Budget, Report, check_run
from specfuse.train.tokenizer import train_tokenizer
from specfuse.train.training import Settings, Training, budgets, world_clips, write_reports
from specfuse.train.vision import vision_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["STATE", "Settings", "TargetTraining", "save_model", "train_target"]


class TargetTraining(Training):
    """A Video-LLaVA in training."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerFast, clips: Clips):
        model = build_model(settings.preset, tokenizer, settings.seed).to(settings.device)
        inner = model.model
        parts = (inner.multi_modal_projector, inner.language_model, model.lm_head)
        super().__init__(settings, model, inner.video_tower, parts, clips, tokenizer)

    def vision(self, budget: Budget, report: Report) -> None:
        """Stage 1."""

        def loss_at(step: int, share: float) -> Tensor:
            return vision_loss(
                self.tower, self.heads, self.clips, self.settings.preset, self.settings.seed, step
            )

        self.run("vision", loss_at, budget, report)

    def language(self, budget: Budget, report: Report) -> None:
        """Stage 2."""
        preset = self.settings.preset
        features = Features(self.tower, self.clips)
        batches = LanguageBatches(self.tokenizer, self.clips, preset, self.settings.seed)

        def loss_at(step: int, share: float) -> Tensor:
            # Afterwards every second step: long answers teach wording far more than what is seen.
            facts_only = share < preset.facts_share or step % 2 == 1
            chosen, text = batches.at(step, facts_only=facts_only)
            seen = features.frozen(chosen) if share < preset.frozen_share else features.live(chosen)
            said, middle = answer_loss(self.model, batches.start, seen, text, batches.kept(step, share))
            return said + self.facts_known(middle, chosen)

        self.run("language", loss_at, budget, report)


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
    train, held_out = world_clips(settings, report)
    tokenizer = train_tokenizer((q for asked in train.questions for q in asked), preset.vocabulary)
    training = TargetTraining(settings, tokenizer, train)
    if settings.resume:
        training.load()
    directory.mkdir(parents=True, exist_ok=True)
    first, second = budgets(settings)
    if not training.progress["language"].step:
        training.vision(first, report)
    training.language(second, report)
    save_model(training)
    ask = ask_about(training.model, tokenizer, held_out)
    accuracy = examine(ask, held_out, lambda n: report("held out", n / len(held_out.indices), f"{n} clips"))
    write_reports(
        training, accuracy, held_out, ask, TARGET | {"command": "specfuse train target"}, short=False
    )
    return accuracy


def save_model(training: TargetTraining) -> None:
    """Writes model and processor for ``from_pretrained``; weights in half precision, computed in single."""
    inner = training.model.model
    # Pictures are seen with the eyes that videos were learned with.
    inner.image_tower.load_state_dict(inner.video_tower.state_dict())
    training.save_weights()
    build_processor(training.tokenizer).save_pretrained(training.settings.directory)
