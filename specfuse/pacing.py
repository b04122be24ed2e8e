"""When to draft at all: a drafter that is not being believed rests."""

from __future__ import annotations


class Backoff:
    """Skips drafting after passes in which no draft was accepted; any accepted draft ends it.

    After ``patience`` such passes in a row the next one goes undrafted, after the next failure 2 do, then 4,
    up to ``longest``. Where nothing can be predicted, one pass in ``longest + 1`` pays for a draft.

    Source: binary exponential backoff, Metcalfe and Boggs, "Ethernet", Communications of the ACM, 1976.
    """

    def __init__(self, patience: int = 4, longest: int = 16):
        self.patience, self.longest = patience, longest
        self.failures = 0
        self.resting = 0

    def rests(self) -> bool:
        """True where the coming pass should go undrafted."""
        if not self.resting:
            return False
        self.resting -= 1
        return True

    def learn(self, accepted: int) -> None:
        """Takes how many drafts a drafted pass had accepted, all rows together."""
        if accepted:
            self.failures = 0
            return
        self.failures += 1
        if self.failures >= self.patience:
            self.resting = min(2 ** (self.failures - self.patience), self.longest)
