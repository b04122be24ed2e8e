"""CombinedDrafter: several drafters' trees merged into the one with the largest expected gain."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from specfuse.drafters.base import Drafter, DraftState, root_only
from specfuse.tree import TokenTree

_BUCKETS = 16
_PRIOR_WEIGHT = 4.0
_MEMORY = 4096.0


class CombinedDrafter(Drafter):
    """Merges the trees of several drafters and keeps the nodes most likely to be reached.

    The expected number of tokens a tree gains is the sum of its nodes' probabilities, so the best tree of a
    given size holds the most probable nodes. Each drafter's probabilities are first calibrated by what came
    true
    before: per drafter, the hit rate of drafted children by their claimed conditional probability, learned
        while
    running.

    Args:
        drafters: at least one; a drafter without probabilities is taken to be certain, until calibrated.
        min_prob: nodes less likely than this are left out: verifying them costs more than they bring. Where
            nothing can be predicted, calibration ends up below it and the model decodes plainly.

        min_gain: a tree expected to gain fewer tokens than this is not proposed at all.

    Raises:
        ValueError: no drafters, something that is no Drafter, ``min_prob`` outside [0, 1), negative
            ``min_gain``.
    """

    def __init__(self, drafters: Sequence[Drafter], *, min_prob: float = 0.01, min_gain: float = 0.1):
        if not drafters:
            raise ValueError("drafters must hold at least one drafter, got an empty list")
        for drafter in drafters:
            if not isinstance(drafter, Drafter):
                raise ValueError(f"drafters must hold Drafter objects, got {type(drafter).__name__}")
        if not 0.0 <= min_prob < 1.0:
            raise ValueError(f"min_prob must lie in [0, 1), got {min_prob}")
        if min_gain < 0:
            raise ValueError(f"min_gain must not be negative, got {min_gain}")
        self.drafters, self.min_prob, self.min_gain = list(drafters), min_prob, min_gain
        self.needs_target = any(drafter.needs_target for drafter in drafters)
        self.takes_events = any(drafter.takes_events for drafter in drafters)
        self.calibrations = [_Calibration() for _ in drafters]

    @property
    def drafts_first(self) -> bool:
        return any(drafter.drafts_first for drafter in self.drafters)

    def begin(self, state: DraftState) -> None:
        for drafter in self.drafters:
            drafter.begin(state)

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        self._learn_from_last(state)
        # Before the target's first pass there are no hidden states to draft from.
        first = not any(state.answers)
        trees = [
            root_only(state) if first and not drafter.drafts_first else drafter.propose(state, max_nodes)
            for drafter in self.drafters
        ]
        rows = [list(row) for row in zip(*map(_rows_of, trees), strict=True)]
        state.memory[id(self)] = (rows, [len(answer) for answer in state.answers])
        merged = [self._merge(row, state.root(b), max_nodes) for b, row in enumerate(rows)]
        return TokenTree.from_parents(*map(list, zip(*merged, strict=True)))

    def observe(self, tokens: Sequence[int], question: Sequence[int] = ()) -> None:
        for drafter in self.drafters:
            drafter.observe(tokens, question=question)

    def learn(self, state: DraftState) -> None:
        for drafter in self.drafters:
            drafter.learn(state)

    def _merge(self, rows: list[_Row], root: int, max_nodes: int) -> tuple[list[int], list[int], list[float]]:
        tokens, parents, probs = [root], [-1], [1.0]
        index: dict[tuple[int, int], int] = {}
        for row, calibration in zip(rows, self.calibrations, strict=True):
            place, reached = [0], [1.0]
            for node in range(1, len(row.tokens)):
                parent = row.parents[node]
                chance = reached[parent] * calibration.rate(row.chances[node])
                key = (place[parent], row.tokens[node])
                merged = index.get(key)
                if merged is None:
                    merged = index[key] = len(tokens)
                    tokens.append(row.tokens[node])
                    parents.append(place[parent])
                    probs.append(chance)
                elif chance > probs[merged]:
                    probs[merged] = chance
                place.append(merged)
                reached.append(chance)
        best = _best_nodes(tokens, parents, probs, max_nodes, self.min_prob)
        # The root counts 1; the other nodes' probabilities add up to the tokens the tree is expected to gain.
        return best if sum(best[2]) - 1.0 >= self.min_gain else ([root], [-1], [1.0])

    def _learn_from_last(self, state: DraftState) -> None:
        rows, lengths = state.memory.get(id(self), ([], []))
        for b, row in enumerate(rows):
            emitted = state.answers[b][lengths[b] :]
            for tree, calibration in zip(row, self.calibrations, strict=True):
                calibration.learn(tree, emitted)


class _Row:
    """One row of a tree in plain lists, with each node's probability given its parent."""

    def __init__(self, tokens: list[int], parents: list[int], chances: list[float]):
        self.tokens, self.parents, self.chances = tokens, parents, chances


def _rows_of(tree: TokenTree) -> list[_Row]:
    rows = zip(tree.tokens.tolist(), tree.parents.tolist(), tree.num_nodes.tolist(), strict=True)
    if tree.probs is None:
        return [_Row(tokens[:n], parents[:n], [1.0] * n) for tokens, parents, n in rows]
    found = []
    for (tokens, parents, count), probs in zip(rows, tree.probs.tolist(), strict=True):
        chances = [1.0] * count
        for node in range(1, count):
            above = probs[parents[node]]
            chances[node] = min(probs[node] / above, 1.0) if above > 0 else 0.0
        found.append(_Row(tokens[:count], parents[:count], chances))
    return found


class _Calibration:
    """Hit rate of drafted children by claimed probability; starts out believing the claim."""

    def __init__(self) -> None:
        self.hits = [0.0] * _BUCKETS
        self.trials = [0.0] * _BUCKETS
        self.lock = threading.Lock()

    def rate(self, claimed: float) -> float:
        """Calibrated probability of a child that the drafter gives ``claimed``."""
        bucket = min(int(claimed * _BUCKETS), _BUCKETS - 1)
        return (self.hits[bucket] + _PRIOR_WEIGHT * claimed) / (self.trials[bucket] + _PRIOR_WEIGHT)

    def learn(self, tree: _Row, emitted: Sequence[int]) -> None:
        node = 0
        with self.lock:
            for token in emitted:
                following = None
                for child in range(node + 1, len(tree.tokens)):
                    if tree.parents[child] == node:
                        hit = tree.tokens[child] == token
                        self._count(tree.chances[child], hit)
                        following = child if hit else following
                if following is None:
                    return
                node = following

    def _count(self, claimed: float, hit: bool) -> None:
        bucket = min(int(claimed * _BUCKETS), _BUCKETS - 1)
        if self.trials[bucket] >= _MEMORY:
            # Halving forgets slowly, so that a drafter that changes is re-learned.
            self.trials[bucket] /= 2
            self.hits[bucket] /= 2
        self.trials[bucket] += 1
        self.hits[bucket] += hit


def _best_nodes(
    tokens: list[int], parents: list[int], probs: list[float], max_nodes: int, min_prob: float
) -> tuple[list[int], list[int], list[float]]:
    """The root and the ``max_nodes`` most probable nodes; a node never outranks its parent."""
    bounded = probs[:1]
    for node in range(1, len(tokens)):
        bounded.append(min(probs[node], bounded[parents[node]]))
    # Sorting is stable and parents come first, so equal probabilities keep parents before children.
    chosen = [node for node in range(len(tokens)) if bounded[node] >= min_prob]
    chosen = sorted(chosen, key=lambda node: -bounded[node])[: max_nodes + 1]
    chosen.sort()
    place = {node: i for i, node in enumerate(chosen)}
    return (
        [tokens[node] for node in chosen],
        [-1 if node == 0 else place[parents[node]] for node in chosen],
        [bounded[node] for node in chosen],
    )
