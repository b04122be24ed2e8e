"""The ``specfuse`` command: one module per sub-command, errors as one line, progress on stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Something the user can put right; shown as one line on stderr, exit code 2."""


@contextmanager
def working(text: str, shown: bool = True) -> Iterator[None]:
    """Shows a spinner with ``text`` on stderr while the block runs, where stderr is a terminal."""
    if not shown:
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def print_json(value: Any) -> None:
    """Prints ``value`` as the only thing on stdout."""
    print(json.dumps(value, indent=2))


def pick_device(name: str) -> Any:
    """The torch device of --device; ``auto`` is the GPU where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name!r} can not be used: {str(error).splitlines()[0]}") from None
    return device


def model_directory(name: str | os.PathLike[str]) -> str:
    """The directory that an option names: one that exists, or that of a model that ships with the package."""
    from specfuse.data import miniature

    if not os.path.exists(name) and str(name) in miniature.NAMES:
        return str(miniature.directory(str(name)))
    return str(name)


def shipped_or_given(path: Path | None) -> Path | None:
    """:func:`model_directory` of an option that may be left out."""
    return None if path is None else Path(model_directory(path))


def load_head(option: str, directory: str | os.PathLike[str], target: Any) -> Any:
    """The HeadDrafter in a directory; refused if it drafts from events, which a command line can not give."""
    from specfuse.drafters import HeadDrafter

    drafter = HeadDrafter.from_pretrained(directory, target)
    if drafter.head.config.event_width:
        raise UserError(
            f"{option} {directory}: this head was trained with events; it drafts in Python only, from "
            "draft_inputs={'event_features': ...}"
        )
    return drafter


def parse_nodes(text: str) -> int | str:
    """The value of --nodes: a number of drafted tokens that one pass may verify, or ``"auto"``."""
    if text == "auto":
        return text
    if text.isdecimal() and 1 <= int(text) <= 1023:
        return int(text)
    raise UserError(f"--nodes must be a number from 1 to 1023 or auto, got {text!r}")
