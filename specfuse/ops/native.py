"""The native modules, where they were built: ``cpu`` and ``cuda`` are modules or None, ``missing`` says why."""

from __future__ import annotations

import importlib
from types import ModuleType

missing: dict[str, str] = {}


def _load(device: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"specfuse._C_{device}")
    except ImportError as error:  # not built, or built for another interpreter or C++ runtime
        missing[device] = str(error)
        return None


cpu = _load("cpu")
cuda = _load("cuda")
