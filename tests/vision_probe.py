"""Counts what a Video-LLaVA does: frames through its towers, tokens through its language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from specfuse.models import adapter_for


class Work:
    """What was computed since the last `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything counted so far."""
        self.tower_calls = 0
        self.frames = 0
        self.passes: list[tuple[int, int]] = []  # (B, tokens) of each pass of the language model

    @property
    def first_pass(self) -> tuple[int, int]:
        """(B, tokens) of the first pass."""
        return self.passes[0]


@contextmanager
def count_work(model: Any) -> Iterator[Work]:
    """Hooks the model's towers and its language model for the length of a `with` block."""
    work = Work()

    def tower(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        work.tower_calls += 1
        work.frames += pixels.shape[0]

    def language(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch, tokens = kwargs["inputs_embeds"].shape[:2]
        work.passes.append((batch, tokens))

    adapter = adapter_for(model)
    hooks = [t.register_forward_pre_hook(tower, with_kwargs=True) for t in adapter.towers(model)]
    hooks.append(adapter.language_model(model).register_forward_pre_hook(language, with_kwargs=True))
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()
