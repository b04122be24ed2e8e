"""Event recordings as a call names them: one per row, each encoded once."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specfuse.drafters.base import Drafter
from specfuse.events import EventStream, load

MOST_SCENES = 16
"""Features kept at most: 4.8 MB each for a 7B drafter in half precision."""


def check_takes_events(drafter: Drafter | None, events: Any) -> None:
    """Raises ValueError for events given to a drafter that would not look at them."""
    if events is not None and (drafter is None or not drafter.takes_events):
        name = "None" if drafter is None else type(drafter).__name__
        raise ValueError(f"events: drafter {name} takes no events; pass a specfuse.EventDrafter, say")


def rows_of_events(events: Any, batch: int, copies: int) -> Any:
    """``events`` of a call with one entry for each of B rows; None and what ``see`` made stay as they are.

    Args:
        events: None, an EventStream, the path of an event file, a list of them, or a drafter's ``see``.
        batch: B.
        copies: ``num_return_sequences``: a list may have one entry for each prompt.

    Raises:
        ValueError: entries of another type, or another number of them.
    """
    if events is None or isinstance(events, Mapping):
        return events
    rows = [events] * batch if isinstance(events, EventStream | str | os.PathLike) else events
    if not isinstance(rows, Sequence) or not all(
        isinstance(row, EventStream | str | os.PathLike) for row in rows
    ):
        raise ValueError(
            "events must be an EventStream, the path of an event file, a list of them, or what "
            f"EventDrafter.see returns, got {type(events).__name__}"
        )
    if copies > 1 and len(rows) * copies == batch:
        rows = [row for row in rows for _ in range(copies)]
    if len(rows) != batch:
        raise ValueError(f"events hold {len(rows)} streams for {batch} rows")
    return list(rows)


class SceneFeatures:
    """Features of the scenes seen last, so that a second question about one encodes nothing.

    A stream is known again as the same object, a file by its path, size and time of change; neither may be
    changed in place.

    Args:
        encode: features ``[S, K, D]`` of S streams, for a size of pictures.
    """

    def __init__(self, encode: Callable[[list[EventStream], Any], Tensor]):
        self.encode = encode
        self._kept: OrderedDict[Any, tuple[Any, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, scenes: Sequence[Any], size: Any = None) -> Tensor:
        """``[S, K, D]`` of streams or paths, encoding what is new in one batch.

        Raises:
            FileNotFoundError, ValueError: as :func:`specfuse.events.load`.
        """
        keys = [(_identity(scene), size) for scene in scenes]
        found = {key: self._get(key, scene) for key, scene in zip(keys, scenes, strict=True)}
        new = {key: scene for key, scene in zip(keys, scenes, strict=True) if found[key] is None}
        if new:
            streams = [scene if isinstance(scene, EventStream) else load(scene) for scene in new.values()]
            for (key, scene), features in zip(new.items(), self.encode(streams, size), strict=True):
                found[key] = features
                self._keep(key, scene, features)
        return torch.stack([found[key] for key in keys])  # type: ignore[misc]

    def _get(self, key: Any, scene: Any) -> Tensor | None:
        with self._lock:
            reference, features = self._kept.get(key, (None, None))
            # An id is given again once its object is gone.
            if features is None or (reference is not None and reference() is not scene):
                return None
            self._kept.move_to_end(key)
            return features

    def _keep(self, key: Any, scene: Any, features: Tensor) -> None:
        reference = weakref.ref(scene) if isinstance(scene, EventStream) else None
        with self._lock:
            self._kept[key] = (reference, features)
            self._kept.move_to_end(key)
            while len(self._kept) > MOST_SCENES:
                self._kept.popitem(last=False)


def _identity(scene: Any) -> Any:
    if isinstance(scene, EventStream):
        return id(scene)
    path = os.path.realpath(scene)
    # What is missing is named by the reader, in its own words.
    told = os.stat(path) if os.path.exists(path) else None
    return (path, told.st_mtime_ns, told.st_size) if told else path
