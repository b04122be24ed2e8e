"""Pixels and sounds as the processors of different families make them: every shape that is worth a try."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

Noise = Callable[..., Tensor]


def noise_of(model: PreTrainedModel) -> Noise:
    """Draws noise of a given shape in the model's dtype."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)

    return noise


def vision_of(config: Any) -> Any:
    """Configuration of the part that looks at pixels."""
    for name in ("vision_config", "vision_encoder_config", "vq_config", "high_res_vision_config"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return config


def single(value: Any, default: int) -> int:
    """The first number of nested lists; the default where there is none above zero."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if isinstance(value, int) and value > 0 else default


def pictures(model: PreTrainedModel, parameters: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """One picture: ``pixel_values`` and what goes with them."""
    vision, noise = vision_of(model.config), noise_of(model)
    size = single(getattr(vision, "image_size", getattr(model.config, "image_size", None)), 32)
    patch = single(getattr(vision, "patch_size", None), 8)
    yield from _patches(vision, parameters, noise, patch)
    if "image_position_ids" in parameters:
        places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).flip(1)[None]
        yield {"pixel_values": noise(1, 36, 3 * patch * patch), "image_position_ids": places}
    if "aspect_ratio_ids" in parameters:
        tiles = getattr(vision, "max_num_tiles", 4)
        ratios = {"aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long)}
        ratios["aspect_ratio_mask"] = torch.ones(1, 1, tiles, dtype=torch.long)
        yield {"pixel_values": noise(1, 1, tiles, 3, size, size), **ratios}
    sizes = {"image_sizes": torch.tensor([[size, size]])} if "image_sizes" in parameters else {}
    high = {"high_res_pixel_values": noise(1, 3, size, size)} if "high_res_pixel_values" in parameters else {}
    yield {"pixel_values": noise(1, 3, size, size), **sizes, **high}
    if sizes:
        yield {"pixel_values": noise(1, 3, size, size)}
    for count in range(1, 7):
        stacked = {"pixel_values": noise(1, count, 3, size, size), **sizes}
        if "pixel_attention_mask" in parameters:
            stacked["pixel_attention_mask"] = torch.ones(1, count, size, size, dtype=torch.long)
        yield stacked
        yield {"pixel_values": stacked["pixel_values"][0], **sizes}


def _patches(
    vision: Any, parameters: Collection[str], noise: Noise, patch: int
) -> Iterator[dict[str, Tensor]]:
    """Sixteen patches in a row, and the grid that they make."""
    frames = single(getattr(vision, "temporal_patch_size", None), 1)
    for name in ("image_grid_thw", "grid_thw", "image_grid_hws", "spatial_shapes", "target_sizes"):
        if name not in parameters:
            continue
        more = {name: torch.tensor([[1, 4, 4]]) if "thw" in name else torch.tensor([[4, 4]])}
        if "image_merge_sizes" in parameters:
            more["image_merge_sizes"] = torch.tensor([2])
        if "pixel_attention_mask" in parameters:
            more["pixel_attention_mask"] = torch.ones(1, 16, dtype=torch.long)
        for channels in sorted({3 * frames, 3, 6}, reverse=True):
            flat = noise(16, channels * patch * patch)
            yield {"pixel_values": flat, **more}
            yield {"pixel_values": flat[None], **more}
            strip = flat.reshape(16, channels, patch, patch).permute(1, 2, 0, 3).reshape(channels, patch, -1)
            yield {"pixel_values": strip[None], **more}
            yield {"pixel_values": noise(16, channels, patch, patch), **more}


def sounds(model: PreTrainedModel, parameters: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """One sound: ``input_features`` and what goes with them."""
    noise = noise_of(model)
    parts = [getattr(model.config, name, None) for name in ("audio_config", "encoder_config")]
    audio = next((part for part in parts if part is not None), model.config)
    names = ("num_mel_bins", "input_dim", "input_feat_size", "feature_size")
    mels = single(next((getattr(audio, n) for n in names if getattr(audio, n, None)), None), 8)
    longest = single(getattr(audio, "max_source_positions", None), 32)
    masks = [name for name in ("input_features_mask", "feature_attention_mask") if name in parameters]
    for length in dict.fromkeys((2 * longest, 64, 60, 3000)):
        mask = {name: torch.ones(1, length, dtype=torch.long) for name in masks}
        for features in (noise(1, mels, length), noise(1, length, mels)):
            yield {"input_features": features, **mask}
            yield {"input_features": features, **{name: m.bool() for name, m in mask.items()}}
            yield {"input_features": features}
