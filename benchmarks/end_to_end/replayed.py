"""Recorded answers on real compute: a model does the work of its passes, the recording decides what it says.

A hook behind the model's forward raises one logit of each position to where it is the largest: that of the
token recorded there. A node of a draft tree stands at the position that its depth gives it, so a node on the
recorded path is followed by the recorded token, and what a node off the path says is never read, since such a
node is rejected. The hook is the same for every competitor; :func:`hook_us` measures it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

RAISED = 3e4  # above any logit, inside float16


class Script:
    """What models say, by position: ``table[p]`` is the token that follows position p.

    Args:
        length: positions, of the longest prompt and answer together.
        device: of the models.
    """

    def __init__(self, length: int, device: torch.device | str):
        # Filled in place: a captured graph or a compiled model reads the same memory every time.
        self.table = torch.zeros(length, dtype=torch.int64, device=device)

    def write(self, prompt: int, answer: Sequence[int]) -> None:
        """From now on ``answer`` follows a prompt of ``prompt`` tokens.

        Raises:
            ValueError: it does not fit.
        """
        if prompt < 1 or prompt - 1 + len(answer) > len(self.table):
            given = f"a prompt of {prompt} and an answer of {len(answer)} tokens"
            raise ValueError(f"{given} do not fit into {len(self.table)}")
        self.table.zero_()
        self.table[prompt - 1 : prompt - 1 + len(answer)] = torch.tensor(answer, device=self.table.device)

    def give(self, model: Any) -> Any:
        """Makes ``model`` follow the script; returns the hook's handle."""
        return model.register_forward_hook(self._follow, with_kwargs=True)

    def _follow(self, model: Any, arguments: Any, inputs: dict[str, Any], output: Any) -> None:
        logits: Tensor = output.logits
        positions = inputs.get("position_ids")
        if positions is None:
            raise ValueError("a replayed model must be called with position_ids")
        told = self.table[positions[:, -logits.shape[1] :]]
        logits.scatter_(-1, told[..., None].expand(logits.shape[0], -1, -1), RAISED)


def hook_us(script: Script, nodes: int, vocabulary: int, dtype: torch.dtype) -> float:
    """Median microseconds that the hook adds to a pass over ``nodes`` nodes."""
    device = script.table.device
    output = type("Output", (), {"logits": torch.zeros(1, nodes, vocabulary, dtype=dtype, device=device)})
    inputs = {"position_ids": torch.arange(nodes, device=device)[None]}
    times = []
    for _ in range(50):
        start = time.perf_counter()
        script._follow(None, (), inputs, output)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def imperfect(answer: Sequence[int], rate: float, seed: int, vocabulary: int) -> list[int]:
    """The answer with a share ``rate`` of its tokens right, in drawn places, and wrong ones elsewhere.

    The share is exact, so that a few answers are enough to measure on.

    Raises:
        ValueError: ``rate`` is no share.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be from 0 to 1, got {rate}")
    right = set(random.Random(seed).sample(range(len(answer)), round(rate * len(answer))))
    return [token if place in right else (token + 1) % vocabulary for place, token in enumerate(answer)]
