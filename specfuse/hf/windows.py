"""Whether a decoder honours the sliding window in its config."""

from __future__ import annotations

import sys
from typing import Any

from transformers import PreTrainedModel


def ignores_window(model: PreTrainedModel) -> bool:
    """Return whether the config has a sliding window that the decoder's code makes no mask for.

    ``model.generate`` then still drops keys from its cache, so its tokens depend on how a prompt is split
    into passes (a LLaMA whose config carries ``sliding_window``).
    """
    config: Any = model.config.get_text_config(decoder=True)
    if not getattr(config, "sliding_window", None):
        return False
    modules = {type(part).__module__ for part in model.modules() if isinstance(part, PreTrainedModel)}
    names = ("create_sliding_window_causal_mask", "create_masks_for_generate")
    return not any(hasattr(sys.modules[module], name) for module in modules for name in names)
