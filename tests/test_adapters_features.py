"""Features of both encoders on the same clips: which place of one belongs to which of the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from specfuse.train import adapter_features
from specfuse.train.adapter_features import drafter_tokens, encoder_pairs, target_tokens


def test_encoder_pairs_of_two_towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    frames = draw.integers(0, 255, (20, 8, 64, 64, 3), np.uint8)
    pictures = draw.integers(0, 255, (20, 5, 64, 64, 3), np.uint8)
    shown = type("Clips", (), {})
    clips = np.array([0, 3, 19, 7])
    monkeypatch.setattr(adapter_features, "split", lambda name: np.array([3, 7]))

    def load(indices, cache):
        found = shown()
        found.frames = frames[indices]
        return found

    monkeypatch.setattr(adapter_features, "load_clips", load)
    monkeypatch.setattr(adapter_features, "load_event_pictures", lambda indices, cache: pictures[indices])
    target, drafter = towers()
    seen, sources = target_tokens(target, frames[clips]), drafter_tokens(drafter, pictures[clips])
    assert seen.shape == (4, 8, 65, 16) and sources.shape == (4, 5, 65, 24)
    made = {name: encoder_pairs(name, target, drafter, clips, tmp_path) for name in adapter_features.FEATURES}
    assert made["pooled"].held_out.tolist() == [False, True, False, True]
    close = {"atol": 2e-3, "rtol": 2e-3}  # kept in half precision
    torch.testing.assert_close(made["pooled"].source, sources.mean((1, 2)), **close)
    torch.testing.assert_close(made["pooled"].target, seen.mean((1, 2)), **close)
    torch.testing.assert_close(made["tokens"].target, seen.mean(1), **close)
    torch.testing.assert_close(made["keyframe"].target, seen[:, 1:].mean(1), **close)
    torch.testing.assert_close(made["keyframe"].context, seen[:, 0], **close)
    # Patch (row 2, column 5) of the target belongs to place (1, 2), where it is the second of four.
    patches = seen.mean(1)[:, 1:]
    torch.testing.assert_close(made["expand"].target[:, 4 * (4 + 2) + 1], patches[:, 2 * 8 + 5], **close)
    places = sources.mean(1)[:, 1:].unflatten(1, (8, 8))
    torch.testing.assert_close(made["expand"].source[:, 4 + 2], places[:, 2:4, 4:6].mean((1, 2)), **close)
    assert made["pixels"].source.shape == made["pixels"].target.shape == (4, 64 * 64 * 3)
    np.testing.assert_allclose(made["pixels"].target[1], frames[3, 7].reshape(-1) / 255, atol=1e-3)

    # What the towers said is kept: they are not asked again.
    monkeypatch.setattr(adapter_features, "load_clips", None)
    assert torch.equal(
        encoder_pairs("tokens", target, drafter, clips, tmp_path).source, made["tokens"].source
    )
    with pytest.raises(ValueError, match=r"features must be one of pooled, .* got 'nonsense'"):
        encoder_pairs("nonsense", target, drafter, clips, tmp_path)


def towers():
    """Random towers with the attributes that the models have."""
    models = []
    for width, name in ((16, "video_tower"), (24, "visual_tower")):
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=8,
        )
        model = nn.Module()
        model.model = nn.Module()
        setattr(model.model, name, CLIPVisionModel(config).eval())
        models.append(model)
    return models
