"""Telling memory that ran out from other errors: what can be tried again with less."""

from __future__ import annotations

import torch

# PyTorch's CPU allocators raise a plain RuntimeError.
_CPU_TEXTS = ("not enough memory", "can't allocate memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_TEXTS)
