"""``python -m specfuse.data.miniature [NAME=DIRECTORY ...]``: checks what ships, or puts models in."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from specfuse.data import miniature


def main(arguments: Sequence[str], root: Path = miniature.ROOT) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr."""
    try:
        pairs = [argument.partition("=") for argument in arguments]
        if wrong := [name for name, sign, _ in pairs if not sign]:
            raise ValueError(f"arguments must read NAME=DIRECTORY, got {wrong[0]!r}")
        if pairs:
            miniature.ship({name: path for name, _, path in pairs}, root)
        manifest = miniature.read_manifest(root)
        for name in miniature.shipped(root):
            size = sum(entry["bytes"] for entry in manifest[name].values())
            print(
                f"{miniature.directory(name, root)}: {len(manifest[name])} files, {size:,} bytes, unchanged"
            )
        if not manifest:
            print(f"{root}: no models")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
