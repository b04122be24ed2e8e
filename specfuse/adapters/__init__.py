"""Adapters between a drafter and a target: modules to train, with ``save_pretrained``.

Those of ``modules`` run fused in :func:`specfuse.adapter_cosine`.
"""

from __future__ import annotations

from specfuse.adapters.base import AdapterModel
from specfuse.adapters.checkpoint import KINDS, kind_of, load_adapter
from specfuse.adapters.configuration import (
    CompressionDrafterConfig,
    CrossAttentionAlignerConfig,
    LightweightAdapterConfig,
    LinearAdapterConfig,
    ResidualMLPAdapterConfig,
    TokenAlignmentAdapterConfig,
    TokenExpanderConfig,
)
from specfuse.adapters.drafts import CompressionDrafter, TokenAlignmentAdapter
from specfuse.adapters.modules import LightweightAdapter, LinearAdapter, ResidualMLPAdapter
from specfuse.adapters.tokens import CrossAttentionAligner, TokenExpander

__all__ = [
    "AdapterModel",
    "CompressionDrafter",
    "CompressionDrafterConfig",
    "CrossAttentionAligner",
    "CrossAttentionAlignerConfig",
    "KINDS",
    "LightweightAdapter",
    "LightweightAdapterConfig",
    "LinearAdapter",
    "LinearAdapterConfig",
    "ResidualMLPAdapter",
    "ResidualMLPAdapterConfig",
    "TokenAlignmentAdapter",
    "TokenAlignmentAdapterConfig",
    "TokenExpander",
    "TokenExpanderConfig",
    "kind_of",
    "load_adapter",
]
