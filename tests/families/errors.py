"""Errors in one line."""

from __future__ import annotations

import traceback
from pathlib import Path


def described(error: BaseException, place: bool = True) -> str:
    """An error in one line: type, text, and where it was raised."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if place and frames else ""
    return f"{type(error).__name__}: {text[:300]}{where}"
