"""A drafter as one call sees it: where it fails, the call goes on without drafts."""

from __future__ import annotations

import logging

from specfuse.drafters.base import Drafter, DraftState, root_only
from specfuse.drafters.guard import checked
from specfuse.stats import GenerationStats
from specfuse.tree import TokenTree

logger = logging.getLogger("specfuse")

# A drafter looks at its inputs when it is first asked, or, where it reads the target's states, when it is
# first given some: the second time at the latest.
_LOOKS_AT_ARGUMENTS = 2
_MISTAKES = (ValueError, FileNotFoundError, PermissionError, ImportError)


class SupervisedDrafter:
    """One call's drafter; None proposes nothing.

    The line between the caller's mistakes and the drafter's: a ValueError of the first two proposals of a
    call surfaces (no events given, draft_inputs of the wrong shape, a bad tree), and so does an event file
    that can not be read; whatever else it raises, and
    whatever ``learn`` and ``observe`` raise, ends drafting for this call, is logged once, and stands in
    ``stats.drafting_stopped``. The answer is the same either way.

    Args:
        drafter: what proposes.
        stats: of the call.
    """

    def __init__(self, drafter: Drafter | None, stats: GenerationStats):
        self.drafter, self.stats = drafter, stats
        self.asked = 0

    @property
    def enabled(self) -> bool:
        """Whether it is still asked."""
        return self.drafter is not None and self.stats.drafting_stopped is None

    @property
    def drafts_first(self) -> bool:
        """Whether it proposes before the target's first pass."""
        return self.drafter is None or self.drafter.drafts_first

    @property
    def needs_target(self) -> bool:
        """Whether it reads the target's states."""
        return self.drafter is not None and self.drafter.needs_target

    def begin(self, state: DraftState) -> None:
        """Lets the drafter start beside the target's first pass."""
        if self.drafter is None:
            return
        try:
            self.drafter.begin(state)
        except Exception as error:
            self.stop(f"drafter {type(self.drafter).__name__} raised {_described(error)} before it was asked")

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        """The drafter's trees, checked; the roots alone where it failed, now or before.

        Raises:
            ValueError: the caller's own arguments, as above.
        """
        if self.drafter is None or not self.enabled:
            return root_only(state)
        self.asked += 1
        try:
            return checked(self.drafter.propose(state, max_nodes), state, max_nodes, self.drafter)
        except Exception as error:
            if isinstance(error, _MISTAKES) and self.asked <= _LOOKS_AT_ARGUMENTS:
                raise
            self.stop(f"drafter {type(self.drafter).__name__} raised {_described(error)}")
        # What it kept for this call may be a whole model's cache.
        state.memory.pop(id(self.drafter), None)
        return root_only(state)

    def learn(self, state: DraftState) -> None:
        """Shows the drafter what the call came to."""
        if self.drafter is None or not self.enabled:
            return
        try:
            self.drafter.learn(state)
        except Exception as error:
            self.stop(f"drafter {type(self.drafter).__name__} raised {_described(error)} once it was over")

    def stop(self, reason: str) -> None:
        """Ends drafting for this call; only the first reason counts."""
        if self.stats.drafting_stopped is None:
            self.stats.drafting_stopped = reason
            logger.warning("%s; the rest of this call goes without drafts", reason)
            logger.debug("where it happened", exc_info=True)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
