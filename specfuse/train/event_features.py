"""Event features of the driving world's clips, as an EventGPT's encoder computes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from specfuse.models.checkpoint import load_eventgpt
from specfuse.train.event_store import load_event_pictures
from specfuse.train.head_batches import EventFeatures


class EventEncoder(NamedTuple):
    """What makes features of clips, and their width."""

    features: EventFeatures
    width: int


def event_encoder(
    directory: str | os.PathLike[str], cache: str | os.PathLike[str], device: str = "cpu"
) -> EventEncoder:
    """The encoder of an EventGPT in a directory, applied to the world's clips by index.

    Args:
        directory: as ``specfuse train drafter`` writes it.
        cache: of event pictures; what is missing is drawn.
        device: where to compute.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: another kind of model, or broken files.
    """
    model, processor = load_eventgpt(directory, dtype=torch.float32, device=device)

    @torch.no_grad()
    def features(clips: Sequence[int]) -> Tensor:
        pictures = load_event_pictures(clips, Path(cache))
        pixels = processor.pixels(event_images=list(pictures))
        return model.get_event_features(pixels.to(model.device))

    return EventEncoder(features, model.config.text_config.hidden_size)
