"""Adapters between feature spaces: modules to train, run fused by :func:`specfuse.adapter_cosine`."""

from __future__ import annotations

from specfuse.adapters.modules import LightweightAdapter, LinearAdapter, ResidualMLPAdapter

__all__ = ["LightweightAdapter", "LinearAdapter", "ResidualMLPAdapter"]
