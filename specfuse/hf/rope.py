"""Rope types whose frequencies depend on how long a pass is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LENGTH_DEPENDENT = ("dynamic", "longrope")


def length_dependent_rope(config: Any) -> tuple[str, int] | None:
    """Return the first rope type of a text config that changes with the length, and where it changes.

    Args:
        config: a decoder's text config; ``rope_parameters`` may hold one rope, or one per layer type.

    Returns:
        The rope type and the number of tokens beyond which its frequencies differ, or None.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return None
    for rope in (parameters, *(part for part in parameters.values() if isinstance(part, Mapping))):
        if rope.get("rope_type") in _LENGTH_DEPENDENT:
            name = "original_max_position_embeddings"
            boundary = rope.get(name) or getattr(config, name, None) or config.max_position_embeddings
            return str(rope["rope_type"]), int(boundary)
    return None
