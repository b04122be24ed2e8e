"""Bounds of attention that a decoder applies without transformers' mask functions."""

from __future__ import annotations

import sys
from typing import Any

from transformers import PreTrainedModel

_MASKS = ("create_sliding_window_causal_mask", "create_masks_for_generate")


def unmasked_window(model: PreTrainedModel) -> int | None:
    """Return the smallest window of a text config that the decoder's code makes no mask for.

    Either the class ignores the field and only its cache drops keys (a LLaMA whose config has
    ``sliding_window``), or it counts slots inside its layers (GPT-Neo, Doge). Both depend on how a prompt is
    split into passes. None where there is no such window.
    """
    config: Any = model.config.get_text_config(decoder=True)
    sizes = [
        value
        for name, value in vars(config).items()
        if "window" in name and "layers" not in name and type(value) is int and value > 1
    ]
    if not sizes:
        return None
    modules = {type(part).__module__ for part in model.modules() if isinstance(part, PreTrainedModel)}
    masked = any(hasattr(sys.modules[module], name) for module in modules for name in _MASKS)
    return None if masked else min(sizes)


def slots_of_causal_buffers(model: PreTrainedModel) -> int | None:
    """Return how many slots the causal masks hold that layers keep as buffers (GPT-Neo); None without any."""
    sizes = [
        buffer.shape[-1]
        for name, buffer in model.named_buffers()
        if name.endswith(".bias") and buffer.dim() == 4
    ]
    return min(sizes, default=None)
