"""Sizes of the models that ``specfuse train`` makes, and how long they are trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Preset:
    """Everything that decides what is trained; the same preset and seed see the same batches."""

    name: str
    vocabulary: int  # entries of the tokenizer, at most
    vision_width: int
    vision_layers: int  # one more than Video-LLaVA reads: it takes the layer before the last
    text_width: int
    text_layers: int
    heads: int  # of both towers and of the language model
    train_clips: int
    held_out_clips: int  # that accuracy is measured on
    vision_share: float  # of the time: stage 1
    facts_share: float  # of the time of stage 2: facts only, without what follows them
    frozen_share: float  # of the time of stage 2: with the tower as stage 1 left it
    sparse_share: float  # of the time of stage 2: with some patches of each frame left out
    least_patches: int  # of each frame at the start of stage 2; grows to all of them
    vision_clips: int  # a batch of stage 1, two frames of each
    fact_clips: int  # a batch of stage 2 while only facts are asked
    fact_questions: int  # about each of them
    text_clips: int  # a batch of stage 2 afterwards
    questions: int  # about each of them
    vision_rate: float = 1.2e-3
    text_rate: float = 2e-3
    minutes: float = 40.0


PRESETS = {
    "tiny": Preset(
        name="tiny",
        vocabulary=1200,
        vision_width=128,
        vision_layers=5,
        text_width=128,
        text_layers=4,
        heads=4,
        train_clips=4166,
        held_out_clips=200,
        vision_share=0.25,
        facts_share=0.35,
        frozen_share=0.85,
        sparse_share=0.8,
        least_patches=12,
        vision_clips=24,
        fact_clips=6,
        fact_questions=8,
        text_clips=4,
        questions=6,
    ),
    "micro": Preset(
        name="micro",
        vocabulary=400,
        vision_width=32,
        vision_layers=2,
        text_width=32,
        text_layers=2,
        heads=2,
        train_clips=12,
        held_out_clips=2,
        vision_share=0.5,
        facts_share=0.25,
        frozen_share=0.5,
        sparse_share=0.5,
        least_patches=8,
        vision_clips=4,
        fact_clips=2,
        fact_questions=4,
        text_clips=2,
        questions=3,
        text_rate=1e-2,
        minutes=0.1,
    ),
}


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
