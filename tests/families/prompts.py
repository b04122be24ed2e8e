"""Prompts for a small model: text of several lengths, a padded batch, and pictures where it takes any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

LOWEST, HIGHEST = 5, 60  # of the ids that prompts are made of


@dataclass
class Prompt:
    """Inputs of one call, and how many tokens to ask for."""

    name: str
    inputs: dict[str, Any]
    new: int
    length: int


def words(count: int, seed: int) -> Tensor:
    """``[1, count]`` ids of text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(LOWEST, HIGHEST, (1, count), generator=generator)


def text_prompts(model: PreTrainedModel) -> list[Prompt]:
    """A short prompt, one that is longer than a window, and two rows of different lengths."""
    prompts = []
    for name, rows, new in (("short", (5,), 20), ("long", (27,), 12), ("padded", (12, 5), 14)):
        width = max(rows)
        ids = torch.cat([words(width, 10 * width + n) for n in range(len(rows))])
        mask = torch.stack([(torch.arange(width) >= width - n).long() for n in rows])
        prompts.append(Prompt(name, {"input_ids": ids * mask, "attention_mask": mask}, new, width))
    return prompts
