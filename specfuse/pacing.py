"""When to draft at all: a drafter that is not being believed rests."""

from __future__ import annotations

from specfuse.stats import GenerationStats
from specfuse.tree import TokenTree


class Backoff:
    """Skips drafting after passes in which no draft was accepted; any accepted draft ends it.

    After ``patience`` such passes in a row the next one goes undrafted, after the next failure 2 do, then 4,
    up to ``longest``. Where nothing can be predicted, one pass in ``longest + 1`` pays for a draft. A
    drafter that had nothing to propose is asked again sooner, after at most ``longest // 4`` passes.

    Source: binary exponential backoff, Metcalfe and Boggs, "Ethernet", Communications of the ACM, 1976.
    """

    def __init__(self, patience: int = 4, longest: int = 16):
        self.patience, self.longest = patience, longest
        self.failures = 0
        self.resting = 0
        self.asked = False

    def rests(self) -> bool:
        """True where the coming pass should go undrafted."""
        self.asked = self.resting == 0
        self.resting -= self.resting > 0
        return not self.asked

    def trim(self, tree: TokenTree) -> TokenTree:
        """What is kept of a tree: here, all of it."""
        return tree

    def learn(
        self, accepted: int, drafted: int = 1, rows: int = 1, stats: GenerationStats | None = None
    ) -> None:
        """Takes what a pass came to.

        Args:
            accepted: drafts, all rows.
            drafted: drafts of the widest row.
            rows: that took part.
            stats: of the call so far.
        """
        if accepted:
            self.failures = 0
            return
        self.failures += 1
        if self.failures >= self.patience:
            longest = self.longest if drafted else self.longest // 4
            self.resting = min(2 ** (self.failures - self.patience), longest)
