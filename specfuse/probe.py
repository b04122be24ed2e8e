"""The generation loop with a stop-watch: what each pass cost and what its drafts were worth."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from specfuse.drafters import Drafter, DraftState, root_only
from specfuse.drafters.guard import leave_out_finished
from specfuse.generate import SpeculativeGenerator
from specfuse.pacing import Backoff
from specfuse.tree import TokenTree


class Pass(NamedTuple):
    """One pass of the target behind the prefill."""

    width: int  # nodes of the widest row, root included
    depth: int  # of the deepest draft
    rows: int  # rows that took part
    emitted: int  # tokens, all rows
    draft_ms: float  # proposing, checks of the tree included
    pass_ms: float  # everything else: forward, verification, commit, bookkeeping


class Probe(SpeculativeGenerator):
    """Generates as ever, drafts in every pass, learns nothing, and keeps a record.

    Attributes:
        passes: the passes of the last call, in order.
        offered, accepted: by depth d (1 is the first draft): how often a draft stood behind an accepted path
            of length d - 1, and how often one of those was right.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter | None,
        max_nodes: int,
        clock: Callable[[], float] = time.perf_counter,
    ):
        super().__init__(model, drafter, max_nodes=max_nodes)
        self.clock = clock
        self.passes: list[Pass] = []
        self.offered: Counter[int] = Counter()
        self.accepted: Counter[int] = Counter()
        self._open: tuple[TokenTree, list[int], float] | None = None
        self._sent = 0.0
        self._answers: list[list[int]] = []
        self.prompts: list[list[int]] = []
        self.questions: list[tuple[int, ...]] = []

    def run(self, inputs: Mapping[str, Any]) -> list[list[int]]:
        """One call of ``generate``; returns every row's answer."""
        self.passes, self._open, self._answers = [], None, []
        self.offered, self.accepted = Counter(), Counter()
        self.generate(**inputs)
        return self._answers

    def draft(self, state: DraftState) -> TokenTree:
        """The tree of the coming pass."""
        return super()._propose(state, _Restless())

    def _propose(self, state: DraftState, pace: Backoff) -> TokenTree:
        start = self.clock()
        self._close(state, start)
        begin = self.clock()
        tree = self.draft(state)
        self._sent = self.clock()
        # The tree that rides on the prompt belongs to the prefill, whose time says nothing about a pass.
        if any(state.answers):
            self._open = (tree, [len(answer) for answer in state.answers], (self._sent - begin) * 1e3)
        return tree

    def _learn(self, state: DraftState) -> None:
        self._close(state, self.clock())
        self._answers = [list(answer) for answer in state.answers]
        self.prompts = state.prompts
        self.questions = [state.question(row) for row in range(state.batch_size)]

    def _close(self, state: DraftState, now: float) -> None:
        if self._open is None:
            return
        tree, before, draft_ms = self._open
        self._open = None
        emitted = [answer[done:] for answer, done in zip(state.answers, before, strict=True)]
        self.passes.append(
            Pass(
                width=tree.width,
                depth=int(tree.depths().max()),
                rows=sum(bool(tokens) for tokens in emitted),
                emitted=sum(map(len, emitted)),
                draft_ms=draft_ms,
                pass_ms=(now - self._sent) * 1e3,
            )
        )
        for row, tokens in enumerate(emitted):
            self._follow(tree, row, tokens)

    def _follow(self, tree: TokenTree, row: int, emitted: Sequence[int]) -> None:
        """Counts, along the path that was emitted, where drafts were offered and where one was right."""
        children: dict[int, dict[int, int]] = defaultdict(dict)
        tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
        for child in range(1, int(tree.num_nodes[row])):
            children[parents[child]][tokens[child]] = child
        node: int | None = 0
        for depth, token in enumerate(emitted, start=1):
            if node is None or node not in children:
                return
            self.offered[depth] += 1
            node = children[node].get(token)
            self.accepted[depth] += node is not None


class _Restless(Backoff):
    """Lets the drafter draft before every pass."""

    def rests(self) -> bool:
        return False


class _Enough(Exception):
    """Ends a call of generation whose passes have all been measured."""


class CostProbe(Probe):
    """Times passes over chains of given lengths on the real cache; what they draft means nothing."""

    def __init__(
        self,
        model: PreTrainedModel,
        lengths: Iterator[int],
        max_nodes: int,
        clock: Callable[[], float] = time.perf_counter,
    ):
        super().__init__(model, None, max_nodes, clock)
        self.lengths = lengths
        self.random = random.Random(0)

    def draft(self, state: DraftState) -> TokenTree:
        if not any(state.answers):
            return leave_out_finished(root_only(state), state)
        length = next(self.lengths, None)
        if length is None:
            raise _Enough
        if length == 0:
            return leave_out_finished(root_only(state), state)
        # Random tokens: a chain that came true would use the answer up.
        words = self.random.choices(self._words(state), k=length)
        roots = [state.root(row) for row in range(state.batch_size)]
        return leave_out_finished(TokenTree.from_chains(roots, [words] * len(roots)), state)

    @staticmethod
    def _words(state: DraftState) -> list[int]:
        """Some ids that stand for text."""
        candidates = range(min(state.vocab_size or 256, 4096))
        return [token for token in candidates if token not in state.visual_token_ids]


def pass_times(
    model: PreTrainedModel,
    sample: Sequence[Mapping[str, Any]],
    lengths: Sequence[int],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, list[float]]:
    """Milliseconds of passes over ``1 + length`` nodes, by length, at the sample's prompts.

    All lengths take turns, in an order drawn anew each round, so that a machine that becomes slower makes all
    of them slower; a first round is thrown away. ``clock`` counts seconds: the processor's own, say, where
    others use the machine.

    Raises:
        ValueError: no answer of the sample goes beyond its first token.
    """
    turns, shuffle = [], random.Random(1)
    for _ in range(rounds + 1):
        turns += shuffle.sample(lengths, len(lengths))
    times: list[float] = []
    while len(times) < len(turns):
        before = len(times)
        for inputs in sample:
            probe = CostProbe(model, iter(turns[len(times) :]), max(*lengths, 1), clock)
            with suppress(_Enough):
                probe.run(inputs)
            times += [each.pass_ms for each in probe.passes]
            if len(times) >= len(turns):
                break
        if len(times) == before:
            raise ValueError("inputs: every answer ends with its first token; there is no pass to measure")
    found: dict[int, list[float]] = {length: [] for length in lengths}
    for length, elapsed in list(zip(turns, times, strict=False))[len(lengths) :]:
        found[length].append(elapsed)
    return found
