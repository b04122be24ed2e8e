"""What the generic shrinker can not know: fields of single model types. Dots lead into sub-configurations."""

from __future__ import annotations

from typing import Any

MODEL_TYPES: dict[str, dict[str, Any]] = {}
