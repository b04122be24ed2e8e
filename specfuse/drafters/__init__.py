"""Drafters: anything cheap that proposes trees of tokens. They never import the generation loop."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from specfuse.drafters.base import Drafter, DraftState, root_only
from specfuse.drafters.combine import CombinedDrafter
from specfuse.drafters.corpus import CorpusDrafter
from specfuse.drafters.head import HeadDrafter
from specfuse.drafters.head_layer import DraftHead, HeadConfig, holds_head
from specfuse.drafters.lookup import PromptLookupDrafter
from specfuse.drafters.model import ModelDrafter
from specfuse.drafters.scene_memory import SceneMemory

__all__ = [
    "CombinedDrafter",
    "CorpusDrafter",
    "DraftHead",
    "DraftState",
    "Drafter",
    "HeadConfig",
    "HeadDrafter",
    "ModelDrafter",
    "PromptLookupDrafter",
    "SceneMemory",
    "auto_drafter",
    "holds_head",
    "resolve_drafter",
    "root_only",
]

_AUTO: weakref.WeakKeyDictionary[Any, Drafter] = weakref.WeakKeyDictionary()
_AUTO_LOCK = threading.Lock()


def auto_drafter(model: Any) -> CombinedDrafter:
    """The drafter that ``drafter="auto"`` uses for this model object, made at its first use and kept with it.

    Its parts are ``.drafters[0]``, the :class:`CorpusDrafter` (``save``, ``load``, ``clear``), and prompt
    lookup.
    """
    with _AUTO_LOCK:
        drafter = _AUTO.get(model)
        if drafter is None:
            drafter = _AUTO[model] = CombinedDrafter([CorpusDrafter(), PromptLookupDrafter()])
        return drafter  # type: ignore[return-value]


def resolve_drafter(drafter: Drafter | str | None, model: Any) -> Drafter | None:
    """A drafter object from what the ``drafter`` argument may be.

    Raises:
        ValueError: anything but a Drafter, None, ``"auto"``, ``"corpus"``, ``"lookup"`` or ``"none"``.
    """
    if drafter is None or drafter == "none":
        return None
    if isinstance(drafter, Drafter):
        return drafter
    if drafter == "auto":
        return auto_drafter(model)
    if drafter == "lookup":
        return PromptLookupDrafter()
    if drafter == "corpus":
        return auto_drafter(model).drafters[0]
    raise ValueError(
        f"drafter must be a specfuse Drafter, None, 'auto', 'corpus', 'lookup' or 'none', got {drafter!r}"
    )
