"""When to draft at all: a drafter that is not being believed rests."""

from __future__ import annotations


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

    def learn(self, accepted: int, drafted: int = 1) -> None:
        """Takes what asking the drafter came to: drafts accepted and made in that pass, all rows."""
        if accepted:
            self.failures = 0
            return
        self.failures += 1
        if self.failures >= self.patience:
            longest = self.longest if drafted else self.longest // 4
            self.resting = min(2 ** (self.failures - self.patience), longest)
