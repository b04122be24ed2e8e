"""Small random Hugging Face models and inputs for the tests: plain functions, no fixtures.

The weights are drawn with a standard deviation far above the usual 0.02, so that a random model has opinions:
its greedy answer depends on the prompt and is not one token repeated. Nothing here is downloaded.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = 3
"""Text tokens are drawn from this id on; the visual placeholders are the last two ids of the vocabulary."""


def randomize(model: PreTrainedModel, seed: int, gain: float = 2.0) -> PreTrainedModel:
    """Redraws every matrix of `model` with variance `gain^2 / fan_in` (embeddings: 1), varies the rest."""
    generator = torch.Generator().manual_seed(seed)
    embedding_ids = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if id(parameter) in embedding_ids or name.endswith("class_embedding"):
                value = noise
            elif parameter.ndim >= 2:
                value = noise * (gain / parameter[0].numel() ** 0.5)
            else:
                value = parameter.double() + 0.1 * noise
            parameter.copy_(value)
    return model


def finish(model: PreTrainedModel, seed: int, dtype: torch.dtype, eos: bool) -> PreTrainedModel:
    """Random weights, eval mode, `dtype`, and a generation config that a test can rely on."""
    randomize(model, seed)
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS if eos else None
    return model.to(dtype).eval()


def llama_config(
    vocab: int = 128, layers: int = 2, hidden: int = 64, heads: int = 4, kv_heads: int = 2
) -> LlamaConfig:
    """LLaMA configuration of the tiny models' language part."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def tiny_llama(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vocab: int = 128,
    layers: int = 2,
    eos: bool = True,
    **sizes: int,
) -> LlamaForCausalLM:
    """Random `LlamaForCausalLM`; `sizes`: hidden, heads, kv_heads; `eos=False` never stops by itself."""
    return finish(LlamaForCausalLM(llama_config(vocab, layers, **sizes)), seed, dtype, eos)


def tiny_qwen2(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vocab: int = 128,
    layers: int = 2,
    eos: bool = True,
    **sizes: int,
) -> Qwen2ForCausalLM:
    """Random `Qwen2ForCausalLM` (biases in q, k, v); arguments as `tiny_llama`."""
    values = llama_config(vocab, layers, **sizes)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=values.hidden_size,
        intermediate_size=values.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=values.num_attention_heads,
        num_key_value_heads=values.num_key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return finish(Qwen2ForCausalLM(config), seed, dtype, eos)


def tiny_video_llava(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vocab: int = 128,
    layers: int = 2,
    eos: bool = True,
    attn_implementation: str = "sdpa",
    image_size: int = 28,
    vision_hidden: int = 32,
    vision_layers: int = 3,
    **sizes: int,
) -> VideoLlavaForConditionalGeneration:
    """Random Video-LLaVA: CLIP towers (28 px, patch 14: 5 tokens a frame) and a LLaMA.

    The last two ids of the vocabulary are the image and the video placeholder; text prompts use those below.
    """
    vision_config = CLIPVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=2 * vision_hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
    )
    config = VideoLlavaConfig(
        vision_config=vision_config,
        text_config=llama_config(vocab, layers, **sizes),
        image_token_index=vocab - 2,
        video_token_index=vocab - 1,
        vision_feature_layer=-2,
    )
    config._attn_implementation = attn_implementation
    model = VideoLlavaForConditionalGeneration(config)
    model.set_attn_implementation(attn_implementation)
    finish(model, seed, dtype, eos)
    with torch.no_grad():  # a logit of 0 never wins: answers hold no placeholders and can be continued
        model.lm_head.weight[[config.image_token_index, config.video_token_index]] = 0
    return model


def tokens_per_frame(model: VideoLlavaForConditionalGeneration, video: bool = True) -> int:
    """Placeholder tokens of one frame: patches + CLS; an image with the "default" strategy has no CLS."""
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + 1 if video or model.config.vision_feature_select_strategy == "full" else patches


def random_text(model: PreTrainedModel, length: int, generator: torch.Generator) -> list[int]:
    """`length` random text tokens (no specials, no placeholders)."""
    text_config = model.config.get_text_config()
    reserved = 2 if hasattr(model.config, "video_token_index") else 0
    high = text_config.vocab_size - reserved
    return torch.randint(SPECIAL_TOKENS, high, (length,), generator=generator).tolist()


def left_pad(rows: list[list[int]], pad: int = PAD) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, both int64 [B, S], padded on the left."""
    width = max(len(row) for row in rows)
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def random_prompts(
    model: PreTrainedModel,
    batch: int = 1,
    seed: int = 0,
    pad: bool = True,
    text_lens: list[int] | None = None,
) -> dict[str, Tensor]:
    """Text prompts: `input_ids`, `attention_mask` [B, S]. `pad=True` gives rows of different lengths."""
    generator = torch.Generator().manual_seed(1000 + seed)
    lengths = text_lens or [7 + (3 * row if pad else 0) for row in range(batch)]
    return left_pad([[BOS, *random_text(model, length, generator)] for length in lengths])


def video_inputs(
    model: VideoLlavaForConditionalGeneration,
    batch: int = 1,
    frames: int = 4,
    seed: int = 0,
    pad: bool = True,
    text_lens: list[int] | None = None,
    question_seed: int | None = None,
    clips: list[int] | None = None,
) -> dict[str, Tensor]:
    """One clip and one question per row: `BOS USER-like text, video placeholders, question`.

    Args:
        model: from `tiny_video_llava`.
        batch: rows B.
        frames: frames per clip.
        seed: draws the clips (`clips` picks among them) and, with `question_seed=None`, the questions.
        pad: rows get questions of different lengths, so that shorter rows are left padded.
        text_lens: question length of each row (overrides `pad`).
        question_seed: another seed gives another question about the same clips.
        clips: index of the clip of each row; default: a clip of its own for each row.

    Returns:
        `input_ids`, `attention_mask` int64 [B, S]; `pixel_values_videos` [B, frames, 3, H, W].
    """
    generator = torch.Generator().manual_seed(seed if question_seed is None else question_seed)
    lengths = text_lens or [6 + (2 * row if pad else 0) for row in range(batch)]
    visual = [model.config.video_token_index] * (frames * tokens_per_frame(model))
    prologue = [BOS, 5, 6, 7]
    rows = [prologue + visual + random_text(model, length, generator) for length in lengths]
    clip_ids = clips or list(range(batch))
    pixels = torch.stack([random_clip(model, frames, 100 * seed + clip) for clip in clip_ids])
    return {**left_pad(rows), "pixel_values_videos": pixels}


def random_clip(model: VideoLlavaForConditionalGeneration, frames: int, seed: int) -> Tensor:
    """Random normalised frames [frames, 3, H, W] in the model's dtype."""
    size = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(10_000 + seed)
    return torch.randn(frames, 3, size, size, generator=generator).to(model.dtype)


def image_inputs(
    model: VideoLlavaForConditionalGeneration,
    batch: int = 1,
    seed: int = 0,
    pad: bool = True,
    images_per_row: list[int] | None = None,
) -> dict[str, Tensor]:
    """Image prompts: `input_ids`, `attention_mask` [B, S] and the pixels [num_images, 3, H, W].

    The pixel keyword is the installed transformers': `pixel_values_images`, or `pixel_values` since 5.23.
    Row r holds `images_per_row[r]` images (default 1), each followed by a few words.
    """
    generator = torch.Generator().manual_seed(500 + seed)
    counts = images_per_row or [1] * batch
    image = [model.config.image_token_index] * tokens_per_frame(model, video=False)
    rows = []
    for row, count in enumerate(counts):
        ids = [BOS, 5, 6]
        for _ in range(count):
            ids += image + random_text(model, 3, generator)
        rows.append(ids + random_text(model, 4 + (2 * row if pad else 0), generator))
    out = left_pad(rows)
    if sum(counts):
        out[image_keyword(model)] = torch.cat(
            [random_clip(model, 1, 7000 + 10 * seed + i) for i in range(sum(counts))]
        )
    return out


def image_keyword(model: VideoLlavaForConditionalGeneration) -> str:
    """Name under which the installed transformers' Video-LLaVA takes images."""
    parameters = inspect.signature(type(model.model).forward).parameters
    return "pixel_values" if "pixel_values" in parameters else "pixel_values_images"
