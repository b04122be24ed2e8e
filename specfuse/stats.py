"""What one generation cost and what its drafts were worth."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field


@dataclass
class GenerationStats:
    """Counts and times of one call.

    Args:
        passes: forward passes of the target, the prefill included, counted once per row that took part: the
            number a row-by-row plain decoder would have to beat. For B = 1 simply the number of passes.
        tokens: emitted tokens, all rows.
        drafted: drafted nodes that were verified, all rows.
        emitted_histogram: how often a pass of a row emitted 1, 2, 3, ... tokens.
        from_drafts: per row, for each emitted token whether it was an accepted draft, not the target's
            own.
        prefill_ms: wall time of the first pass (vision tower included).
        draft_ms: wall time spent proposing.
        verify_ms: wall time of the target's passes after the first, including the choice of the path. On a
            GPU the time is seen where the host waits for the result, which is inside this part.
        commit_ms: wall time of keeping the path, stopping criteria and streaming.
        drafting_stopped: why the rest of the call went without drafts (the drafter raised, memory ran out),
            or None.
    """

    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    emitted_histogram: Counter[int] = field(default_factory=Counter)
    from_drafts: defaultdict[int, list[bool]] = field(default_factory=lambda: defaultdict(list))
    prefill_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    commit_ms: float = 0.0
    drafting_stopped: str | None = None

    @property
    def tokens_per_pass(self) -> float:
        """Mean emitted tokens per pass and row; 1.0 is plain decoding."""
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def histogram(self) -> dict[int, int]:
        """``emitted_histogram`` as a plain dict, in order."""
        return dict(sorted(self.emitted_histogram.items()))

    @property
    def accepted(self) -> int:
        """Emitted tokens that were drafts, all rows."""
        return sum(map(sum, self.from_drafts.values()))

    def count(self, emitted: int, drafted: int, accepted: int = 0, row: int = 0) -> None:
        """Records one pass of one row; the first ``accepted`` of its ``emitted`` tokens were drafts."""
        drafts = min(accepted, emitted)
        self.from_drafts[row] += [True] * drafts + [False] * (emitted - drafts)
        self.passes += 1
        self.tokens += emitted
        self.drafted += drafted
        self.emitted_histogram[emitted] += 1

    def as_dict(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        return {
            "passes": self.passes,
            "tokens": self.tokens,
            "tokens_per_pass": self.tokens_per_pass,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "emitted_histogram": self.histogram,
            "prefill_ms": self.prefill_ms,
            "draft_ms": self.draft_ms,
            "verify_ms": self.verify_ms,
            "commit_ms": self.commit_ms,
            "drafting_stopped": self.drafting_stopped,
        }


class Clock:
    """Splits a call's wall time into parts."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Milliseconds since the last lap."""
        now = time.perf_counter()
        elapsed, self.last = (now - self.last) * 1e3, now
        return elapsed
