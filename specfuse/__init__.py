"""specfuse: video-language models answer faster without changing what they say.

Letters used in every shape comment:

    B  batch                      S  prefix length (slots already in the cache)
    N  tree nodes, root included  H  query heads      G  key/value heads
    K  longest path               D  head or feature dimension
    V  vocabulary                 L  layers           R  adapter width
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specfuse.drafters import CombinedDrafter as CombinedDrafter
    from specfuse.drafters import CorpusDrafter as CorpusDrafter
    from specfuse.drafters import Drafter as Drafter
    from specfuse.drafters import DraftState as DraftState
    from specfuse.drafters import HeadDrafter as HeadDrafter
    from specfuse.drafters import ModelDrafter as ModelDrafter
    from specfuse.drafters import PromptLookupDrafter as PromptLookupDrafter
    from specfuse.drafters import SceneMemory as SceneMemory
    from specfuse.drafters import auto_drafter as auto_drafter
    from specfuse.drafters.event import EventDrafter as EventDrafter
    from specfuse.generate import SpeculativeGenerator as SpeculativeGenerator
    from specfuse.generate import custom_generate as custom_generate
    from specfuse.generate import generate as generate
    from specfuse.model_check import Verdict as Verdict
    from specfuse.model_check import check as check
    from specfuse.ops.adapter_cosine import AlignedScore as AlignedScore
    from specfuse.ops.adapter_cosine import adapter_cosine as adapter_cosine
    from specfuse.ops.compact_kv import compact_kv as compact_kv
    from specfuse.ops.tree_attention import tree_attention as tree_attention
    from specfuse.ops.verify_tree import AcceptedPath as AcceptedPath
    from specfuse.ops.verify_tree import verify_tree as verify_tree
    from specfuse.ops.verify_tree_rejection import verify_tree_rejection as verify_tree_rejection
    from specfuse.passes.attention import register_attention as register_attention
    from specfuse.plan import Plan as Plan
    from specfuse.plan import plan as plan
    from specfuse.session import VideoSession as VideoSession
    from specfuse.stats import GenerationStats as GenerationStats
    from specfuse.tree import TokenTree as TokenTree
    from specfuse.vision.cache import VisionCache as VisionCache
    from specfuse.vision.cache import patch as patch
    from specfuse.vision.cache import patched as patched
    from specfuse.vision.cache import unpatch as unpatch

__version__ = "0.1.0"

_HOME = {
    "AcceptedPath": "specfuse.ops.verify_tree",
    "AlignedScore": "specfuse.ops.adapter_cosine",
    "CombinedDrafter": "specfuse.drafters",
    "CorpusDrafter": "specfuse.drafters",
    "DraftState": "specfuse.drafters",
    "Drafter": "specfuse.drafters",
    "EventDrafter": "specfuse.drafters.event",
    "GenerationStats": "specfuse.stats",
    "HeadDrafter": "specfuse.drafters",
    "ModelDrafter": "specfuse.drafters",
    "Plan": "specfuse.plan",
    "PromptLookupDrafter": "specfuse.drafters",
    "SceneMemory": "specfuse.drafters",
    "SpeculativeGenerator": "specfuse.generate",
    "TokenTree": "specfuse.tree",
    "VideoSession": "specfuse.session",
    "VisionCache": "specfuse.vision.cache",
    "adapter_cosine": "specfuse.ops.adapter_cosine",
    "Verdict": "specfuse.model_check",
    "auto_drafter": "specfuse.drafters",
    "check": "specfuse.model_check",
    "compact_kv": "specfuse.ops.compact_kv",
    "custom_generate": "specfuse.generate",
    "generate": "specfuse.generate",
    "patch": "specfuse.vision.cache",
    "patched": "specfuse.vision.cache",
    "plan": "specfuse.plan",
    "register_attention": "specfuse.passes.attention",
    "tree_attention": "specfuse.ops.tree_attention",
    "unpatch": "specfuse.vision.cache",
    "verify_tree": "specfuse.ops.verify_tree",
    "verify_tree_rejection": "specfuse.ops.verify_tree_rejection",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    # Names are imported at first use, so that `specfuse --help` does not wait for torch.
    if name not in _HOME:
        raise AttributeError(f"module 'specfuse' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(types.ModuleType):
    """Keeps ``specfuse.generate`` and ``specfuse.plan`` functions where importing puts the submodules."""

    @property
    def generate(self) -> Any:
        return importlib.import_module("specfuse.generate").generate

    @generate.setter
    def generate(self, submodule: Any) -> None:
        pass

    @property
    def plan(self) -> Any:
        return importlib.import_module("specfuse.plan").plan

    @plan.setter
    def plan(self, submodule: Any) -> None:
        pass


sys.modules[__name__].__class__ = _Package
