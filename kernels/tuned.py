"""Tuned kernel configurations are data: ``configs/<op>.<gpu>.json``, else ``configs/<op>.json``.

A file holds entries of sizes and the configuration that won there::

    {"op": "tree_attention", "gpu": "nvidia-h200", "measured": true,
     "entries": [{"sizes": {"S": 2048, "N": 32}, "config": {"BLOCK_S": 64, "num_warps": 4}}]}

``<op>.json`` (``gpu`` null, ``measured`` false) is written by reasoning and works everywhere. The file of one
GPU is written by ``benchmarks/tune.py`` on that GPU.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).resolve().parent / "configs"
_log = logging.getLogger("specfuse")
_overrides: dict[str, dict[str, Any]] = {}


def config(op: str, sizes: Mapping[str, int], device: torch.device | None = None) -> dict[str, Any]:
    """The configuration of the entry whose sizes are nearest (log distance, summed over the sizes given).

    Args:
        op: name of the op.
        sizes: problem sizes under the letters of the op's files, e.g. ``{"S": 2091, "N": 32}``.
        device: the GPU to look up; None means the current one, and the untuned file where there is none.

    Raises:
        FileNotFoundError: the op has no untuned file.
    """
    if op in _overrides:
        return _overrides[op]
    return _nearest(op, gpu_name(device), tuple(sizes.items()))


@contextlib.contextmanager
def override(op: str, forced: Mapping[str, Any]) -> Iterator[None]:
    """Inside, every size of ``op`` runs with ``forced``: for tests and the tuner."""
    before = _overrides.get(op)
    _overrides[op] = dict(forced)
    try:
        yield
    finally:
        if before is None:
            del _overrides[op]
        else:
            _overrides[op] = before


def gpu_name(device: torch.device | None = None) -> str | None:
    """``torch.cuda.get_device_name`` in lower case with dashes, e.g. "nvidia-h200"; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return _slug(_device_name(None if device is None else device.index))


def config_file(op: str, gpu: str | None) -> Path:
    """Where the configurations of an op lie; ``gpu`` None is the untuned file."""
    return CONFIGS / (f"{op}.json" if gpu is None else f"{op}.{gpu}.json")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@lru_cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


@lru_cache
def _entries(op: str, gpu: str | None) -> list[dict[str, Any]]:
    path = config_file(op, gpu)
    if gpu is not None and not path.exists():
        _log.info("%s: no tuned configurations for %s, using the untuned ones", op, gpu)
        path = config_file(op, None)
    table = json.loads(path.read_text())
    _log.debug("%s: configurations of %s", op, path.name)
    return table["entries"]


@lru_cache(maxsize=4096)
def _nearest(op: str, gpu: str | None, sizes: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    def distance(entry: dict[str, Any]) -> float:
        known = entry["sizes"]
        return sum(abs(math.log(max(known[k], 1) / max(size, 1))) for k, size in sizes if k in known)

    return min(_entries(op, gpu), key=distance)["config"]
