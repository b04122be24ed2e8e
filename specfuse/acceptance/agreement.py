"""How far one answer is from another, in tokens."""

from __future__ import annotations

from collections.abc import Sequence


def token_agreement(said: Sequence[int], lossless: Sequence[int]) -> float:
    """``1 - edit distance / length`` of the longer one: 1 for the same answer, 0 for nothing in common."""
    row = list(range(len(lossless) + 1))
    for i, x in enumerate(said, start=1):
        above, row = row, [i]
        for j, y in enumerate(lossless, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return 1 - row[-1] / max(len(said), len(lossless), 1)
