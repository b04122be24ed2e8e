"""An untrained Video-LLaVA of a preset's size, with its processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from specfuse.models.tiny import SPECIAL_TOKENS
from specfuse.train.clip_store import SIZE
from specfuse.train.labels import GRID
from specfuse.train.presets import Preset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, VideoLlavaForConditionalGeneration, VideoLlavaProcessor

FRAME_TOKENS = GRID * GRID + 1  # patches and CLS
VIDEO_TOKENS = 8 * FRAME_TOKENS


def build_model(
    preset: Preset, tokenizer: PreTrainedTokenizerFast, seed: int
) -> VideoLlavaForConditionalGeneration:
    """The Hugging Face class with random weights drawn from ``seed``."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        VideoLlavaConfig,
        VideoLlavaForConditionalGeneration,
    )

    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.text_width,
        intermediate_size=preset.text_width * 8 // 3 // 16 * 16,
        num_hidden_layers=preset.text_layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        max_position_embeddings=2048,
        initializer_range=preset.text_width**-0.5 / 2,
        **ids,
    )
    vision = CLIPVisionConfig(
        hidden_size=preset.vision_width,
        intermediate_size=2 * preset.vision_width,
        num_hidden_layers=preset.vision_layers,
        num_attention_heads=preset.heads,
        image_size=SIZE,
        patch_size=SIZE // GRID,
        projection_dim=preset.vision_width,
    )
    config = VideoLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        video_token_index=SPECIAL_TOKENS.index("<video>"),
        image_seq_length=FRAME_TOKENS - 1,
        video_seq_length=VIDEO_TOKENS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoLlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # At CLIP's 0.02 a patch hardly says where it is, and small towers are slow to learn it.
            if name.endswith("position_embedding.weight"):
                weight.mul_(8)
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    model.generation_config.max_new_tokens = 160
    model.generation_config.do_sample = False
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
