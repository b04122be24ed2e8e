"""What kinds of attention a Hugging Face decoder has, and which of them a tree can go through."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from specfuse.passes.attention import NAME as TREE_ATTENTION


class MaskLayout:
    """What kinds of attention a model's layers use: full, sliding, or both."""

    def __init__(self, implementation: str, window: int | None, mixed: bool):
        self.implementation = implementation
        self.window = window
        self.windowed = window is not None
        self.mixed = mixed


def head_dim(config: Any) -> int:
    """D of a decoder's attention heads."""
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def mask_layout(model: PreTrainedModel, config: Any) -> MaskLayout:
    """How the model's decoder attends; ``config`` is its text config.

    Raises:
        ValueError: an encoder-decoder, a model on several devices, an attention implementation that takes no
            tree mask, or layers other than full and sliding attention.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"model {name} is an encoder-decoder, only decoder-only models can be accelerated")
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise ValueError(
            f"model {name} is split over devices {sorted(map(str, devices))}; only models on one device can "
            "be accelerated so far"
        )
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager", TREE_ATTENTION):
        raise ValueError(
            f"attn_implementation={implementation!r} of {name} takes no tree mask; load the model with "
            f"attn_implementation={TREE_ATTENTION!r} (fast for trees in float16 and bfloat16 on a GPU, sdpa "
            "elsewhere), 'sdpa' or 'eager'"
        )
    if getattr(config, "alibi", False):
        raise ValueError(
            f"model {name} attends with alibi, which needs a padding mask and takes no tree mask: "
            "use model.generate"
        )
    kinds = set(getattr(config, "layer_types", None) or [])
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"model {name} has layers of type {sorted(unknown)}, which can not be rolled back")
    window = getattr(config, "sliding_window", None)
    if kinds and "sliding_attention" not in kinds:
        window = None
    if not kinds and not getattr(config, "use_sliding_window", True):
        window = None
    return MaskLayout(implementation, window, mixed=len(kinds) == 2)
