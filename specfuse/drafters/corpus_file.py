"""Files of remembered answers: safetensors that are written whole or not at all, and checked when read."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np

Kinds = Mapping[str, tuple[type[np.generic], int]]
"""Name of an array: its dtype and its number of dimensions."""


def write_arrays(path: str | PathLike[str], arrays: Mapping[str, np.ndarray], format: str) -> None:
    """Writes arrays to a file; one that was there stays whole until the new one is.

    Raises:
        FileNotFoundError, IsADirectoryError: ``path`` is in no existing directory, or is one.
    """
    from safetensors.numpy import save

    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(2, "No such directory", str(target.parent))
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        unfinished.write_bytes(save(dict(arrays), metadata={"format": format}))
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def read_arrays(path: str | PathLike[str], kinds: Kinds, format: str, owner: str) -> dict[str, np.ndarray]:
    """The arrays of a file that :func:`write_arrays` wrote.

    Args:
        path: of the file.
        kinds: the arrays it must hold.
        format: as it was written.
        owner: the class that writes such files, for messages.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: another kind of file, or an array of another type.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    if not path.is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    try:
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("format") != format:
                raise ValueError(f"path {str(path)!r} was not written by {owner}.save")
            arrays = {name: file.get_tensor(name) for name in kinds}
    except SafetensorError as error:
        raise ValueError(f"path {str(path)!r} is not a saved {owner}: {error}") from None
    sizes = {1: "one-dimensional", 2: "two-dimensional"}
    for name, (dtype, ndim) in kinds.items():
        if arrays[name].dtype != dtype or arrays[name].ndim != ndim:
            raise ValueError(f"path {str(path)!r}: {name} must be {sizes[ndim]} {np.dtype(dtype)}")
    return arrays
