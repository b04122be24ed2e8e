"""What adapters learn from: features of a drafter beside features of the target, clip by clip."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = {"specfuse": "pairs", "version": "1"}
HELD_OUT_SHARE = 0.2  # of the clips of a file that does not say which are held out
VALIDATION_SHARE = 0.1  # of the clips that are trained on
_OPTIONAL = ("context", "rows", "answers", "source_head", "target_head")


@dataclass(slots=True)
class Pairs:
    """N samples; features in any float type, kept as they came.

    Args:
        source: ``[N, I]``, or tokens ``[N, L, I]``, of the drafter.
        target: ``[N, D]`` or ``[N, L, D]`` of the target; for an expander ``[N, F L, D]``; for a compression
            drafter the tokens that follow, ``[N, K]`` int64.
        clips: ``[N]`` int64, the clip of each sample. A clip is held out as a whole.
        held_out: ``[N]`` bool: what no training sees.
        context: ``[N, M, C]`` tokens that a cross-attention aligner reads; for a compression drafter the
            last tokens of the text, ``[N, T]`` int64.
        rows: ``[N]`` int64, where several samples share one row of ``source``.
        answers: ``[N]`` int64, the answer of each sample; those of a held-out answer stand in a row, one for
            each token.
        source_head: ``[V, I]``, the drafter's language-model head where ``source`` goes with it.
        target_head: ``[V, D]``, the target's.
        features: what these are, e.g. "pooled".
        about: one line about where they come from.

    Raises:
        ValueError: naming the array, for a shape, type or value that does not fit.
    """

    source: Tensor
    target: Tensor
    clips: Tensor
    held_out: Tensor
    context: Tensor | None = None
    rows: Tensor | None = None
    answers: Tensor | None = None
    source_head: Tensor | None = None
    target_head: Tensor | None = None
    features: str = "file"
    about: str = ""

    def __post_init__(self) -> None:
        count = len(self.target) if self.target.dim() else 0
        if not count or self.target.dim() not in (2, 3):
            raise ValueError(f"target must be [N, D] or [N, L, D], got {list(self.target.shape)}")
        if self.source.dim() not in (2, 3) or not self.source.is_floating_point():
            found = f"{self.source.dtype} {list(self.source.shape)}"
            raise ValueError(f"source must be floats [N, I] or [N, L, I], got {found}")
        numbers = (("clips", torch.int64), ("rows", torch.int64), ("answers", torch.int64))
        for name, dtype in (*numbers, ("held_out", torch.bool)):
            value = getattr(self, name)
            if value is not None and (value.shape != (count,) or value.dtype != dtype):
                raise ValueError(f"{name} must be [{count}] {dtype}, got {list(value.shape)} {value.dtype}")
        if self.rows is None and len(self.source) != count:
            raise ValueError(f"source must have {count} rows like target, got {len(self.source)}")
        if self.rows is not None and not 0 <= int(self.rows.min()) <= int(self.rows.max()) < len(self.source):
            raise ValueError(f"rows must lie in 0 to {len(self.source) - 1}")
        if self.context is not None and len(self.context) != count:
            raise ValueError(f"context must have {count} rows like target, got {len(self.context)}")
        for name, head, width in (
            ("source_head", self.source_head, self.source.shape[-1]),
            ("target_head", self.target_head, self.target.shape[-1]),
        ):
            if head is not None and (head.dim() != 2 or head.shape[1] != width):
                raise ValueError(f"{name} must be [V, {width}], got {list(head.shape)}")
        for name in ("source", "target"):
            if not bool(getattr(self, name).isfinite().all()):
                raise ValueError(f"{name} holds numbers that are not finite")
        if not bool(self.held_out.any()) or bool(self.held_out.all()):
            raise ValueError(
                f"held_out must hold out some of the samples, it holds out {int(self.held_out.sum())}"
            )

    def part(self, name: str) -> Tensor:
        """Samples of one part, ascending: "train", "validation" or "held_out".

        Validation, which decides when training stops, is the last tenth of the clips that are not held out.
        """
        if name == "held_out":
            return self.held_out.nonzero()[:, 0]
        clips = self.clips[~self.held_out].unique()
        first = clips[-max(1, round(VALIDATION_SHARE * len(clips)))]
        validation = (self.clips >= first) & ~self.held_out
        train = (self.clips < first) & ~self.held_out
        if not bool(train.any()):
            raise ValueError(f"clips must be at least 2 outside held_out, got {len(clips)}")
        return (train if name == "train" else validation).nonzero()[:, 0]

    def sources(self, samples: Tensor) -> Tensor:
        """The drafter's features of some samples, in float32."""
        return self.source[samples if self.rows is None else self.rows[samples]].float()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file that ``load_pairs`` reads."""
        from safetensors.torch import save_file

        names = ("source", "target", "clips", "held_out", *_OPTIONAL)
        tensors = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        part = Path(path).with_suffix(f".{os.getpid()}.tmp")
        about = {**FORMAT, "features": self.features, "about": self.about}
        save_file({name: value.contiguous() for name, value in tensors.items()}, part, about)
        part.replace(path)


def load_pairs(path: str | os.PathLike[str]) -> Pairs:
    """Reads pairs from a safetensors file with ``source`` and ``target``, and more as in :class:`Pairs`.

    Without ``clips`` every sample is a clip of its own; without ``held_out`` a fifth of the clips, drawn
    with a fixed seed, is held out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, missing or unknown arrays, or arrays that do not fit.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(2, "no such file of pairs", str(path))
    try:
        with safe_open(path, "pt") as file:
            about: Mapping[str, str] = file.metadata() or {}
            arrays: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file or is broken: {str(error)[:100]}") from None
    if missing := {"source", "target"} - set(arrays):
        raise ValueError(f"{path} has no array {min(missing)!r}")
    if unknown := set(arrays) - {"source", "target", "clips", "held_out", *_OPTIONAL}:
        raise ValueError(f"{path} has an unknown array {min(unknown)!r}")
    count = len(arrays["target"]) if arrays["target"].dim() else 0
    arrays.setdefault("clips", torch.arange(count))
    if "held_out" not in arrays:
        arrays["held_out"] = _hold_out(arrays["clips"])
    return Pairs(**arrays, features=about.get("features", "file"), about=about.get("about", str(path)))


def _hold_out(clips: Tensor) -> Tensor:
    every = clips.unique()
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(every))
    return torch.isin(clips, every[torch.from_numpy(order[: max(1, round(HELD_OUT_SHARE * len(every)))])])


def fit_width(x: Tensor, width: int) -> Tensor:
    """``[..., I]`` to ``[..., D]``, cut off after D or with zeros added: "before" where widths differ."""
    if x.shape[-1] >= width:
        return x[..., :width]
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
