"""The ``specfuse`` command: one module per sub-command, errors as one line, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
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
