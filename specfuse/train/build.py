"""Untrained models of a preset's size, with processors: a Video-LLaVA, and an EventGPT to draft for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from specfuse.models.tokenizer import SPECIAL_TOKENS
from specfuse.train.clip_store import SIZE
from specfuse.train.event_store import NUM_IMAGES
from specfuse.train.labels import GRID
from specfuse.train.presets import Preset
from specfuse.train.tokenizer import PROMPT

if TYPE_CHECKING:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
        VideoLlavaForConditionalGeneration,
        VideoLlavaProcessor,
    )

    from specfuse.models.eventgpt import EventGptForConditionalGeneration
    from specfuse.models.eventgpt_processor import EventGptProcessor

FRAME_TOKENS = GRID * GRID + 1  # patches and CLS
VIDEO_TOKENS = 8 * FRAME_TOKENS


def build_model(
    preset: Preset, tokenizer: PreTrainedTokenizerFast, seed: int
) -> VideoLlavaForConditionalGeneration:
    """The Hugging Face class with random weights drawn from ``seed``."""
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    config = VideoLlavaConfig(
        vision_config=_vision_config(preset),
        text_config=_text_config(preset, tokenizer),
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        video_token_index=SPECIAL_TOKENS.index("<video>"),
        image_seq_length=FRAME_TOKENS - 1,
        video_seq_length=VIDEO_TOKENS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoLlavaForConditionalGeneration(config)
    _finish(model, tokenizer)
    return model


def build_processor(tokenizer: PreTrainedTokenizerFast) -> VideoLlavaProcessor:
    """The processor that goes with it: frames of 64 pixels, CLIP's normalisation."""
    from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor, VideoLlavaVideoProcessor

    size = {"shortest_edge": SIZE}
    crop_size = {"height": SIZE, "width": SIZE}
    return VideoLlavaProcessor(
        image_processor=VideoLlavaImageProcessor(size=size, crop_size=crop_size),
        video_processor=VideoLlavaVideoProcessor(size=size, crop_size=crop_size),
        tokenizer=tokenizer,
        patch_size=SIZE // GRID,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_drafter(
    preset: Preset, tokenizer: PreTrainedTokenizerFast, seed: int
) -> EventGptForConditionalGeneration:
    """An EventGPT with random weights drawn from ``seed``; the tokenizer knows ``<event>``."""
    from specfuse.models.eventgpt import EventGptConfig, EventGptForConditionalGeneration
    from specfuse.models.eventgpt_processor import EVENT_TOKEN

    config = EventGptConfig(
        vision_config=_vision_config(preset),
        text_config=_text_config(preset, tokenizer),
        event_token_index=tokenizer.convert_tokens_to_ids(EVENT_TOKEN),
        num_event_images=NUM_IMAGES,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EventGptForConditionalGeneration(config)
    _finish(model, tokenizer)
    return model


def build_drafter_processor(
    model: EventGptForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> EventGptProcessor:
    """The processor that goes with it: the target's prompt, with ``<event>`` for ``<video>``."""
    from transformers import CLIPImageProcessor

    from specfuse.models.eventgpt_processor import EVENT_TOKEN, EventGptProcessor

    crop_size = {"height": SIZE, "width": SIZE}
    return EventGptProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=crop_size),
        tokenizer,
        num_event_images=NUM_IMAGES,
        event_tokens=model.config.event_tokens,
        conversation=PROMPT.replace("<video>", EVENT_TOKEN),
    )


def _text_config(preset: Preset, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.text_width,
        intermediate_size=preset.text_width * 8 // 3 // 16 * 16,
        num_hidden_layers=preset.text_layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        max_position_embeddings=2048,
        initializer_range=preset.text_width**-0.5 / 2,
        **_special_ids(tokenizer),
    )


def _vision_config(preset: Preset) -> CLIPVisionConfig:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=preset.vision_width,
        intermediate_size=2 * preset.vision_width,
        num_hidden_layers=preset.vision_layers,
        num_attention_heads=preset.heads,
        image_size=SIZE,
        patch_size=SIZE // GRID,
        projection_dim=preset.vision_width,
    )


def _finish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # At CLIP's 0.02 a patch hardly says where it is, and small towers are slow to learn it.
            if name.endswith("position_embedding.weight"):
                weight.mul_(8)
    for name, value in _special_ids(tokenizer).items():
        setattr(model.generation_config, name, value)
    model.generation_config.max_new_tokens = 160
    model.generation_config.do_sample = False


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
