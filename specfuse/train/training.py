"""What the trainings of the miniature's models share: settings, clips, weights, what is resumed, reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from specfuse.data.world import WORLD_SEED, split
from specfuse.train.card import write_card, write_curves
from specfuse.train.clip_store import Clips, load_clips
from specfuse.train.evaluate import Accuracy, Ask
from specfuse.train.loop import STATE, Budget, Progress, Report, read_state, run_stage, write_state
from specfuse.train.presets import Preset
from specfuse.train.vision import Heads, facts_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

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


class Training:
    """A model that learns to see and then to answer: its weights and the state of one run.

    Args:
        settings: what the run is made of.
        model: the Hugging Face model, on its device.
        tower: the part that sees.
        parts: the parts that only stage 2 trains.
        clips: what it learns from.
        tokenizer: the model's.
    """

    def __init__(
        self,
        settings: Settings,
        model: PreTrainedModel,
        tower: nn.Module,
        parts: Sequence[nn.Module],
        clips: Clips,
        tokenizer: PreTrainedTokenizerFast,
    ):
        self.settings, self.model, self.tower = settings, model, tower
        self.clips, self.tokenizer = clips, tokenizer
        preset = settings.preset
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed + 1)
            self.heads = Heads(preset.vision_width).to(settings.device)
            self.text_heads = Heads(preset.text_width).to(settings.device)
        self._parts = [*parts, self.text_heads]
        self.progress = {"vision": Progress(), "language": Progress()}
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

    def run(
        self, stage: str, loss_at: Callable[[int, float], Tensor], budget: Budget, report: Report
    ) -> None:
        """Trains a stage until its budget is used; ``loss_at`` as for ``run_stage``."""
        if stage == "language" and not self.progress["language"].step:
            self.optimizer = self._optimizer("language")

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
            own = [p for part in self._parts for p in part.parameters()]
            slower = preset.text_rate * TOWER_SLOWER
            groups = [{"params": own, "rate": preset.text_rate}, {"params": tower, "rate": slower}]
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))

    def facts_known(self, middle: Tensor, chosen: list[int]) -> Tensor:
        """How badly the facts about clips are read from states ``[M, D]`` at the end of what was seen.

        Questions find what was seen in one place instead of in all of its tokens.
        """
        facts = torch.from_numpy(self.clips.facts[chosen]).long().to(middle.device)
        return FACTS_WEIGHT * facts_loss(self.text_heads.read_facts(middle[:, None, None]), facts)

    def save_weights(self) -> None:
        """Writes the model for ``from_pretrained``; weights in half precision, computed in single."""
        halves = {name: value.half() for name, value in self.model.state_dict().items()}
        self.model.save_pretrained(self.settings.directory, state_dict=halves)


def world_clips(settings: Settings, report: Report) -> tuple[Clips, Clips]:
    """The clips to learn from, and those to be measured on."""
    preset = settings.preset
    train = split("train")[: preset.train_clips]
    # Spread over all held-out drives.
    every = split("held_out")
    held_out = every[np.linspace(0, len(every) - 1, preset.held_out_clips).astype(int)]
    total = len(train) + len(held_out)

    def tell(before: int) -> Callable[[int], None]:
        return lambda n: report("clips", (before + n) / total, f"{before + n} of {total} drawn")

    return load_clips(train, settings.cache, tell(0)), load_clips(held_out, settings.cache, tell(len(train)))


def budgets(settings: Settings) -> tuple[Budget, Budget]:
    """Of the two stages."""
    preset = settings.preset
    seconds = 60 * (settings.minutes or preset.minutes)
    steps = settings.steps or (None, None)
    share = preset.vision_share
    return Budget(share * seconds, steps[0]), Budget((1 - share) * seconds, steps[1])


def write_reports(
    training: Training, accuracy: Accuracy, held_out: Clips, ask: Ask, about: dict[str, Any], short: bool
) -> None:
    """Writes card, curves and ``accuracy.json`` into the directory.

    ``about``: what the card says of the model, see ``specfuse.train.card``; ``short``: examples show the
    drafter's answers in the data.
    """
    settings = training.settings
    examples = []
    for index in range(min(3, len(held_out.indices))):
        asked = held_out.questions[index][index : index + 8 : 7]
        answers = ask(index, [question.text for question in asked], 160)
        wanted = [question.short if short else question.long for question in asked]
        examples += list(zip([question.text for question in asked], answers, wanted, strict=True))
    minutes = "" if settings.minutes is None else f" --minutes {settings.minutes:g}"
    about = about | {
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "train_clips": len(training.clips.indices),
        "seed": settings.seed,
        "command": f"{about['command']} --preset {settings.preset.name}{minutes} --seed {settings.seed}",
    }
    vision, language = training.progress["vision"], training.progress["language"]
    write_card(settings.directory, accuracy, vision, language, examples, about)
    write_curves(settings.directory, training.progress)
    (settings.directory / "accuracy.json").write_text(json.dumps(accuracy.as_dict(), indent=2) + "\n")
