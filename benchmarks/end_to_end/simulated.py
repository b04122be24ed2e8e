"""Drafts of a given quality at no cost."""

from __future__ import annotations

from collections.abc import Sequence

import specfuse


class SimulatedDrafter(specfuse.Drafter):
    """Proposes the next tokens of ``line`` as a chain, whatever was asked.

    ``line`` is an answer in which some tokens are wrong (:func:`end_to_end.replayed.imperfect`), so that a
    draft behind an accepted path is right as often as a token of the line is. The real drafter that would
    reach it is not there, and neither is its cost.
    """

    def __init__(self, line: Sequence[int] = ()):
        self.line = list(line)

    def propose(self, state: specfuse.DraftState, max_nodes: int) -> specfuse.TokenTree:
        chains = []
        for answer, left in zip(state.answers, state.remaining, strict=True):
            done = len(answer)
            chains.append(self.line[done : done + min(max_nodes, left - 1)])
        return specfuse.TokenTree.from_chains([state.root(row) for row in range(len(chains))], chains)
