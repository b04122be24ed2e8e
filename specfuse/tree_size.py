"""``max_nodes="auto"``: how many drafts a pass carries, chosen before each pass from what passes cost here.

A tree is cut to its most probable nodes where expected tokens per millisecond are highest. A ledger keeps the
promise of never being much slower: drafted passes earn or lose time against plain ones, and a drafter in debt
rests until plain passes, of which ``ALLOWANCE`` is set aside, have paid for the next attempt.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from typing import Any

from specfuse.pacing import Backoff
from specfuse.stats import GenerationStats
from specfuse.tree import TokenTree

SIZES = (0, 2, 4, 8, 16, 32, 64)
"""Drafted nodes of a row that count as one width of a pass."""
LARGEST = SIZES[-1]

# Units of the ledger are plain passes: what failed attempts may cost per plain pass and per call, and what a
# drafter that has earned much may lose again. With answers of 50 tokens the first two come to 1.4 %.
ALLOWANCE, GRANT, CREDIT = 0.01, 0.2, 8.0
# Beyond the balance, what one attempt may cost more than a plain pass by what is known of its size.
RISK = 0.25
# Debt is bounded, so that one stall of the machine does not end drafting for an hour.
DEEPEST_DEBT = 1.5
PLAIN_FIRST, PLAIN_EVERY = 2, 128  # passes
FORGET_EVERY = 16  # calls

Times = dict[int, deque[float]]


def new_times() -> Times:
    """The last milliseconds of passes by size: none yet."""
    return {size: deque(maxlen=15) for size in SIZES}


class Costs:
    """What is known about one target and drafter at one batch and prompt size; outlives calls."""

    def __init__(self, times: Times | None = None) -> None:
        self.times = new_times() if times is None else times
        self.predicted, self.accepted = 2.0, 2.0  # drafts per row, recent; the start believes the drafter
        self.balance = 0.0
        self.since_plain = 0
        self.calls = 0

    def pass_ms(self, size: int) -> float:
        """Median time of a pass with ``size`` drafts; what is not known costs what the next smaller does."""
        return _median(self.times[0]) if size == 0 and self.times[0] else self._curve()[size]

    def _curve(self) -> dict[int, float]:
        """``pass_ms`` of every size."""
        medians = {size: _median(times) for size, times in self.times.items() if times}
        curve, known = {}, None
        for size in SIZES:
            known = size if size in medians else known
            if known is None:
                curve[size] = 1.0
                continue
            # No pass costs more than a wider one: what says so was a stall.
            wider = [ms for other, ms in medians.items() if other > size] if known else []
            curve[size] = min([medians[known], *wider])
        return curve

    def forget_strays(self) -> None:
        """Drops sizes measured so rarely that a stall could keep them from ever being tried again."""
        for size in SIZES[1:]:
            if len(self.times[size]) < 3:
                self.times[size].clear()

    @property
    def largest(self) -> int:
        """The largest size that may be tried: one beyond those measured, and no dearer than can be lost."""
        return self._largest(self._curve())

    def _largest(self, curve: dict[int, float]) -> int:
        plain = curve[0]
        budget = max(self.balance, 0.0) + RISK * plain
        widest = max((size for size in SIZES if self.times[size]), default=0)
        found, known = SIZES[1], 0
        for size in SIZES[1 : SIZES.index(widest) + 2]:
            known = size if self.times[size] else known
            # What is not measured: every node costs as much as those of the next smaller size did.
            likely = (curve[known] - plain) * (size / known if known else 1.0)
            found = size if likely <= budget else found
        return found

    @property
    def trust(self) -> float:
        """Accepted drafts per draft that was expected to be accepted."""
        return min(self.accepted / self.predicted, 1.5)

    def best_size(self, gains: list[float], draft_ms: float) -> int:
        """The size with the highest expected tokens per millisecond; ``gains[k]`` tokens from k drafts."""
        curve, trust = self._curve(), self.trust
        largest = self._largest(curve)

        def rate(size: int) -> float:
            gain = gains[min(size, len(gains) - 1)]
            return (1 + trust * gain) / (draft_ms + curve[size])

        # The smaller size where two are equal.
        return max((s for s in SIZES if s <= largest), key=lambda s: (rate(s), -s))


def _median(times: Iterable[float]) -> float:
    ordered = sorted(times)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


_TIMES: weakref.WeakKeyDictionary[Any, dict[tuple[int, int], Times]] = weakref.WeakKeyDictionary()
_COSTS: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()


def costs_of(model: Any, drafter: object, batch: int, prompt: int) -> Costs:
    """The costs kept with this model object and drafter at this batch size and power of two of prompt tokens.

    Pass times are the model's own: a new drafter finds them measured, a new prompt size those of the nearest.
    """
    size = (batch, prompt.bit_length())
    times = _times_of(_TIMES.setdefault(model, {}), *size)
    # A drafter without a hash shares what is known about its kind.
    owner = drafter if type(drafter).__hash__ is not None else type(drafter)
    kept = _COSTS.setdefault(model, weakref.WeakKeyDictionary()).setdefault(owner, {})
    return kept.setdefault(size, Costs(times))


def _times_of(known: dict[tuple[int, int], Times], batch: int, prompt: int) -> Times:
    """Those of this size; new ones begin with three passes each of the nearest prompt size of this batch."""
    if (batch, prompt) not in known:
        times = known[batch, prompt] = new_times()
        others = [key for key in known if key[0] == batch and key[1] != prompt]
        if others:
            nearest = known[min(others, key=lambda key: abs(key[1] - prompt))]
            for size in SIZES:
                times[size] += list(nearest[size])[-3:]
    return known[batch, prompt]


class TreeSize(Backoff):
    """Decides before each pass of one call whether to draft and what to keep of the tree."""

    def __init__(self, costs: Costs, prompt: int):
        super().__init__()
        self.costs, self.prompt = costs, prompt
        self.first = True  # the tree that rides on the prompt
        self.expected = 0.0
        self.draft_ms = 0.0
        self.seen = (0.0, 0.0)
        costs.calls += 1
        if costs.calls % FORGET_EVERY == 0:
            costs.forget_strays()
        plain = costs.pass_ms(0)
        if costs.balance < GRANT * plain:
            costs.balance = min(costs.balance + GRANT * plain, GRANT * plain)

    def rests(self) -> bool:
        costs = self.costs
        self.expected = 0.0
        # A long prompt's pass carries a small tree for nothing to speak of, and tells how things stand.
        drafts = self.first or (
            len(costs.times[0]) >= PLAIN_FIRST and costs.since_plain < PLAIN_EVERY and costs.balance > 0
        )
        self.drafting = drafts
        # Plain passes are learned from too.
        self.asked = True
        return not drafts

    def trim(self, tree: TokenTree) -> TokenTree:
        """The tree's most probable nodes, as many as pay."""
        if tree.width == 1:
            return tree
        chances = _chances(tree)
        gains = _gains(chances)
        size = self.costs.best_size(gains, self.draft_ms)
        if self.first:
            size = max(size, min(8, self.prompt // 32))
        self.expected = gains[min(size, len(gains) - 1)]
        return tree if size >= tree.width - 1 else _cut(tree, chances, size)

    def learn(
        self, accepted: int, drafted: int = 1, rows: int = 1, stats: GenerationStats | None = None
    ) -> None:
        if stats is None:
            raise ValueError("stats must be the call's GenerationStats: costs are read from it")
        per_row = accepted / max(rows, 1)
        drafting, passing = stats.draft_ms, stats.verify_ms + stats.commit_ms
        draft_ms, pass_ms = drafting - self.seen[0], passing - self.seen[1]
        self.seen = (drafting, passing)
        costs, plain = self.costs, self.costs.pass_ms(0)
        if self.expected:
            costs.predicted = 0.9 * costs.predicted + self.expected
            costs.accepted = 0.9 * costs.accepted + per_row
        if self.first:
            self.first = False
            costs.balance = max(costs.balance, 2 * plain) if accepted else costs.balance - draft_ms
            return
        times = costs.times[SIZES[bisect_left(SIZES, min(drafted, LARGEST))]]
        times.append(pass_ms)
        if not self.drafting:
            costs.since_plain = 0
            costs.balance = min(costs.balance + ALLOWANCE * pass_ms, max(costs.balance, GRANT * plain))
            return
        costs.since_plain = costs.since_plain + 1 if drafted else 0
        self.draft_ms = draft_ms
        usual = min(pass_ms, 3 * _median(times)) + min(draft_ms, 3 * plain)
        earned = (1 + per_row) * plain - usual
        costs.balance = max(min(costs.balance + earned, CREDIT * plain), -DEEPEST_DEBT * plain)


def _chances(tree: TokenTree) -> list[list[float]]:
    """Per row and drafted node, how likely it is to be reached."""
    counts = tree.num_nodes.tolist()
    if tree.probs is not None:
        return [probs[1:count] for probs, count in zip(tree.probs.tolist(), counts, strict=True)]
    # A drafter that does not say is taken to be right in three of four steps, and corrected by the trust.
    return [
        [0.75**depth for depth in depths[1:count]]
        for depths, count in zip(tree.depths().tolist(), counts, strict=True)
    ]


def _gains(chances: list[list[float]]) -> list[float]:
    """Expected accepted drafts of the 0, 1, 2, ... most probable nodes, mean over the rows that draft."""
    rows = [sorted(row, reverse=True) for row in chances if row]
    gains = [0.0]
    for node in range(max(map(len, rows), default=0)):
        gains.append(gains[-1] + sum(row[node] for row in rows if node < len(row)) / len(rows))
    return gains


def _cut(tree: TokenTree, chances: list[list[float]], size: int) -> TokenTree:
    """The ``size`` most probable nodes of each row, and their ancestors' order kept."""
    rows = zip(tree.tokens.tolist(), tree.parents.tolist(), chances, tree.num_nodes.tolist(), strict=True)
    tokens, parents = [], []
    for row, above, probable, count in rows:
        bounded = [float("inf")]
        for node in range(1, count):
            bounded.append(min(probable[node - 1], bounded[above[node]]))
        # Sorting is stable and parents stand first: at equal chances a parent comes before its child.
        chosen = sorted(sorted(range(count), key=lambda node: -bounded[node])[: size + 1])
        place = {node: index for index, node in enumerate(chosen)}
        tokens.append([row[node] for node in chosen])
        parents.append([-1 if node == 0 else place[above[node]] for node in chosen])
    return TokenTree.from_parents(tokens, parents)
