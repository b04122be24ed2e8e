"""Video-LLaVAs of real shapes with random weights, made where they run, and prompts of real lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

FRAMES, TEXT_TOKENS, VOCABULARY, LONGEST = 8, 35, 32064, 8192
HEADROOM = 1.15  # weights and KV, and what a prefill needs besides


@dataclass(frozen=True)
class Shape:
    """Language model and vision tower by their widths and depths."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vision_hidden: int
    vision_layers: int


CLIP_LARGE = (1024, 24)
SHAPES = {
    # Its tower is small: what is looked at on a CPU is decoding.
    "tiny": Shape(512, 1376, 8, 8, 8, 64, 2),
    "1b": Shape(2048, 5504, 22, 32, 4, *CLIP_LARGE),
    "7b": Shape(4096, 11008, 32, 32, 32, *CLIP_LARGE),
}


@dataclass(frozen=True)
class Prompt:
    """Tokens of a prompt: 8 frames, with or without the CLS token of each, and 35 tokens of text.

    Without CLS the frames are images, as in LLaVA: Hugging Face keeps the CLS of a video's frames.
    """

    image_size: int
    as_video: bool

    @property
    def frame_tokens(self) -> int:
        return (self.image_size // 14) ** 2 + self.as_video

    @property
    def tokens(self) -> int:
        return FRAMES * self.frame_tokens + TEXT_TOKENS


PROMPTS = {prompt.tokens: prompt for prompt in (Prompt(56, True), Prompt(224, True), Prompt(336, False))}


def config_of(shape: Shape, prompt: Prompt) -> VideoLlavaConfig:
    """The configuration; every head is at least 32 wide."""
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=4 * shape.vision_hidden,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=max(shape.vision_hidden // 64, 1),
        image_size=prompt.image_size,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=LONGEST,
    )
    return VideoLlavaConfig(vision_config=vision, text_config=text)


def build(shape: Shape, prompt: Prompt, device: str, dtype: torch.dtype) -> Any:
    """The model in eval mode, its weights drawn on ``device`` in ``dtype``: no copy of them on the host.

    Raises:
        MemoryError: there is not enough memory; says what is needed and what is there.
    """
    config = config_of(shape, prompt)
    needed, there = bytes_needed(shape, prompt, dtype), bytes_free(device)
    if needed > there:
        raise MemoryError(
            f"this model and its cache need about {needed / 2**30:.1f} GiB in {dtype}, "
            f"{device} has {there / 2**30:.1f} GiB free"
        )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = VideoLlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    # Answers are as long as their recording.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def bytes_needed(shape: Shape, prompt: Prompt, dtype: torch.dtype) -> int:
    """Weights, and per competitor that keeps clips (a dozen) the KV of one clip, with some headroom."""
    with torch.device("meta"):
        model = VideoLlavaForConditionalGeneration(config_of(shape, prompt))
    size = torch.finfo(dtype).bits // 8
    weights = size * sum(parameter.numel() for parameter in model.parameters())
    width = shape.hidden // shape.heads * shape.kv_heads
    kv = 2 * size * shape.layers * width * (prompt.tokens + 1024)
    return int(HEADROOM * (weights + 12 * kv))


def bytes_free(device: str) -> int:
    """Free memory of the device, of the host for "cpu"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def inputs_of(model: Any, prompt: Prompt, words: list[int], clip: int, turn: int) -> dict[str, Tensor]:
    """One clip and one question.

    Args:
        model: as built.
        prompt: its tokens.
        words: ids that the question holds, at most 24.
        clip: number of the clip: its random pixels.
        turn: which question about it; others than the first have other words.
    """
    draw = torch.Generator().manual_seed(1_000_003 + turn)
    filler = torch.randint(5000, 30000, (TEXT_TOKENS,), generator=draw).tolist()
    question = [*(words if turn == 0 else words[:2]), *filler][: TEXT_TOKENS - 3]
    config, size = model.config, prompt.image_size
    seen = config.video_token_index if prompt.as_video else config.image_token_index
    ids = [1, 10, 11, *[seen] * (FRAMES * prompt.frame_tokens), *question]
    pixels = torch.randn(FRAMES, 3, size, size, generator=torch.Generator().manual_seed(clip))
    pixels = pixels.to(model.device, model.dtype)
    shown = {"pixel_values_videos": pixels[None]} if prompt.as_video else {_image_name(model): pixels}
    input_ids = torch.tensor([ids], device=model.device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **shown}


def _image_name(model: Any) -> str:
    # transformers 5.23 renamed it.
    import inspect

    names = inspect.signature(model.forward).parameters
    return "pixel_values" if "pixel_values" in names else "pixel_values_images"
