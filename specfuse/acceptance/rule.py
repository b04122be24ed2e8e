"""What a rule of acceptance is: it may keep drafted tokens that the target would not have chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from specfuse.drafters import Drafter, DraftState
from specfuse.tree import TokenTree


@dataclass
class Tally:
    """What a rule estimated in one call, and what became of it.

    Args:
        trusted: visited places whose likeliest draft the rule's estimate let through.
        estimated: sum of those estimates, or None for a rule that estimates nothing.
        agreed: how many of those drafts were the target's own choice.
        fallback: why the rule accepted nothing of its own, where it could not work.
    """

    trusted: int = 0
    estimated: float | None = None
    agreed: int = 0
    fallback: str | None = None


class ScoredTree(NamedTuple):
    """One pass as a rule sees it: B rows, N nodes."""

    logits: Tensor  # [B, N, V] of the target, after the call's logits processors
    temperature: float  # 0 for greedy
    tree: TokenTree  # on the CPU
    tokens: list[list[int]]  # [B][N] of the tree
    picks: list[list[int]]  # [B][N] what the target chooses behind each node; -1: it has no distribution
    children: list[list[list[int]]]  # [B][N] each node's children, the likeliest first where that is known
    target_states: Tensor | None  # [B, N, D] for rules with needs_states
    state: DraftState
    tally: Tally  # of the call
    ends: frozenset[int]  # tokens that end an answer

    def path(self, row: int, node: int) -> tuple[int, ...]:
        """The drafted tokens from the root, itself not included, to a node."""
        parents, found = self.tree.parents[row].tolist(), []
        while node > 0:
            found.append(self.tokens[row][node])
            node = parents[node]
        return tuple(reversed(found))


class Judgement:
    """A rule's mind about one pass. The default never departs from the target."""

    def visit(self, row: int, node: int) -> None:
        """Is told every place the walk comes to, before anything is decided there."""

    def overrule(self, row: int, path: list[int]) -> list[int]:
        """Nodes to go on with from ``path[-1]``, none of whose children is what the target chose there.

        Args:
            row: b.
            path: nodes so far, the root first.

        Returns:
            A chain of nodes below ``path[-1]``; empty: the target's own choice is emitted and the pass ends.
        """
        return []


class AcceptanceRule:
    """Decides where a draft may stand although the target chose another token. **Every rule is lossy.**

    What the target chose is always followed where it was drafted; a rule is only asked where it was not.
    Where an answer ends stays the target's decision: a rule neither ends one nor goes on behind its end.
    A rule may be shared by calls at once.
    """

    name: str = ""
    needs_states: bool = False
    """True for a rule that compares decoder states: of the target, and of the drafter (``gives_states``)."""

    def settings(self) -> dict[str, Any]:
        """What the output's label says about the rule, ready for JSON."""
        return {}

    def check(self, drafter: Drafter | None) -> None:
        """Raises ValueError for a drafter that the rule can not judge."""
        if self.needs_states and drafter is not None and not drafter.gives_states:
            raise ValueError(
                f"accept: rule {self.name!r} compares decoder states and {type(drafter).__name__} has none; "
                "use a ModelDrafter, an EventDrafter or a HeadDrafter"
            )

    def judge(self, scored: ScoredTree) -> Judgement:
        """Looks at one pass."""
        raise NotImplementedError
