"""Small adapters of every kind with inputs that fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from specfuse.adapters import (
    KINDS,
    AdapterModel,
    CompressionDrafterConfig,
    CrossAttentionAlignerConfig,
    LightweightAdapterConfig,
    LinearAdapterConfig,
    ResidualMLPAdapterConfig,
    TokenAlignmentAdapterConfig,
    TokenExpanderConfig,
)

D, C, V, B = 12, 7, 30, 3


class Sample(NamedTuple):
    config: object
    inputs: Callable[[], tuple[Tensor, ...]]
    shape: tuple[int, ...]  # of what comes out


def features() -> tuple[Tensor]:
    return (torch.randn(B, 5, D),)


SAMPLES = {
    "linear": Sample(LinearAdapterConfig(in_features=D, features=8), features, (B, 5, 8)),
    "residual-mlp": Sample(ResidualMLPAdapterConfig(features=D, width=4), features, (B, 5, D)),
    "lightweight": Sample(LightweightAdapterConfig(features=D, width=4), features, (B, 5, D)),
    "cross-attention": Sample(
        CrossAttentionAlignerConfig(features=D, context_features=C, heads=3, places=5, context_places=6),
        lambda: (torch.randn(B, 5, D), torch.randn(B, 6, C)),
        (B, 5, D),
    ),
    "expander": Sample(
        TokenExpanderConfig(in_features=D, features=8, width=5, places=5), features, (B, 20, 8)
    ),
    "token-alignment": Sample(
        TokenAlignmentAdapterConfig(vocab_size=V, rank=4), lambda: (torch.randn(B, 5, V),), (B, 5, V)
    ),
    "compression": Sample(
        CompressionDrafterConfig(features=D, vocab_size=V, width=16, layers=2, heads=4, horizon=6, context=4),
        lambda: (torch.randn(B, 9, D), torch.randint(0, V, (B, 3))),
        (B, 6, V),
    ),
}


def build(kind: str, *, seed: int | None = None) -> AdapterModel:
    """As it starts, or with random numbers everywhere; in eval mode."""
    adapter = KINDS[kind](SAMPLES[kind].config).eval()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return adapter
