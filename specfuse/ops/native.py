"""Native modules where they were built: ``cpu`` and ``cuda`` are None or modules; ``missing`` tells why."""

from __future__ import annotations

import importlib
from typing import Any

missing: dict[str, str] = {}


def _load(device: str) -> Any:
    try:
        return importlib.import_module(f"specfuse._C_{device}")
    except ImportError as error:  # not built, or built for another interpreter or C++ runtime
        missing[device] = str(error)
        return None


cpu = _load("cpu")
cuda = _load("cuda")
# The loop's own host work; an older build has none of it, and the loop falls back to PyTorch.
step: Any = cpu if hasattr(cpu, "write_step_mask") else None
