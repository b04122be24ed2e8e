"""What specfuse knows about particular vision-language models: one adapter, one file, per model family."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

ADAPTERS = {"video_llava": "specfuse.models.video_llava"}
"""`config.model_type` -> module that holds the model's `ADAPTER`."""


class VisualAdapter(Protocol):
    """How visual inputs enter one model family.

    Attributes:
        model_class: the Hugging Face class that generates, with a `forward(input_ids, pixels...,
            past_key_values)`.
        pixel_names: keyword arguments of `forward` that carry pixels -> the modality they belong to.
        encoded_names: keyword arguments that carry pixels already encoded.
        option_names: keyword arguments that change what the pixels are turned into.
    """

    model_class: type
    pixel_names: Mapping[str, str]
    encoded_names: frozenset[str]
    option_names: frozenset[str]

    def visual_ids(self, model: PreTrainedModel) -> dict[str, int]:
        """Placeholder token id of each modality."""

    def split_pixels(
        self, model: PreTrainedModel, input_ids: Tensor, pixels: Mapping[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        """Pixels of each row of `input_ids` [B, S]; raises `ValueError` where counts do not match."""

    def position_dependent(self, model: PreTrainedModel) -> str | None:
        """Why KV of a prefix depends on what follows it, or None where it does not."""

    def towers(self, model: PreTrainedModel) -> list[nn.Module]:
        """Vision encoders."""

    def language_model(self, model: PreTrainedModel) -> nn.Module:
        """The decoder that receives embeddings."""


def adapter_for(model: PreTrainedModel) -> VisualAdapter:
    """Finds the adapter of a vision-language model.

    Raises:
        ValueError: no adapter knows this class; the message names it.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(model_type, str) and model_type in ADAPTERS:
        adapter: VisualAdapter = import_module(ADAPTERS[model_type]).ADAPTER
        if isinstance(model, adapter.model_class):
            return adapter
    raise ValueError(
        f"model of class {type(model).__name__} is not supported here; supported: "
        "VideoLlavaForConditionalGeneration (unwrap the model where a wrapper holds it)"
    )
