"""What a drafter's decoder held while it drafted: for rules of acceptance that compare it with the target."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class DraftStates:
    """States ``[D]`` behind nodes of B trees, by the drafted tokens from the root to the node.

    Not by the node's number: trees are cut and renumbered on their way to the target.

    Args:
        batch_size: B.
    """

    def __init__(self, batch_size: int):
        self.rows: list[dict[tuple[int, ...], Tensor]] = [{} for _ in range(batch_size)]
        self.frontier: list[list[tuple[int, ...]]] = [[()] for _ in range(batch_size)]

    def keep_roots(self, states: Tensor) -> None:
        """Begins new trees: ``states [B, 1, D]`` behind their roots."""
        self.rows = [{(): row[0]} for row in states]
        self.frontier = [[()] for _ in states]

    def keep(self, row: int, paths: Sequence[tuple[int, ...]], states: Tensor) -> None:
        """Adds ``states [k, D]`` (or more) behind the ends of k paths of a row."""
        self.rows[row].update(zip(paths, states, strict=False))

    def grow(self, tokens: Tensor, above: Tensor, states: Tensor) -> None:
        """Adds a level: states ``[B, k, D]`` behind ``tokens [B, k]``, below places ``above [B, k]``."""
        rows = zip(self.frontier, tokens.tolist(), above.tolist(), strict=True)
        self.frontier = [
            [(*before[a], t) for t, a in zip(row, places, strict=True)] for before, row, places in rows
        ]
        for row, (paths, behind) in enumerate(zip(self.frontier, states, strict=True)):
            self.keep(row, paths, behind)

    def of(self, row: int, path: tuple[int, ...]) -> Tensor | None:
        """The state behind a path; None where the drafter computed none."""
        return self.rows[row].get(path)
