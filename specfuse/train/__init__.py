"""Trains the miniature models on the driving world: ``specfuse train``."""

from specfuse.train.presets import PRESETS, Preset

__all__ = ["PRESETS", "Preset"]
