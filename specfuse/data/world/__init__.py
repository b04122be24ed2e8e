"""A procedural driving world: what the miniature models are trained on.

Scenes come from seeds; frames, events, questions and the answers of two models come from scenes.
Start with ``clip(index)``.
"""

from specfuse.data.world.clips import Clip, clip, events
from specfuse.data.world.questions import FACTUAL, KINDS, Question, score
from specfuse.data.world.splits import NUM_CLIPS, WORLD_SEED, split

__all__ = [
    "Clip",
    "FACTUAL",
    "KINDS",
    "NUM_CLIPS",
    "Question",
    "WORLD_SEED",
    "clip",
    "events",
    "score",
    "split",
]
