"""What drafted chains are worth, from which of a drafter's first choices are the target's."""

from __future__ import annotations

from collections.abc import Sequence

DEPTH = 5


def chain_figures(hits: Sequence[Sequence[bool]], depth: int = DEPTH) -> dict[str, float]:
    """Acceptance and tokens per pass of chains of ``depth`` drafts, along known answers.

    While its drafts are right a greedy drafter sees the target's own text, so from any token on they are
    right for as long as its first choices along that text are: no chain needs to be drafted. The generation
    loop itself lets a drafter rest after failures, which saves drafts and costs some tokens per pass.

    Args:
        hits: for each answer, whether the drafter's first choice for each of its tokens is the target's.
        depth: drafts of a chain.

    Returns:
        ``acceptance_1`` ... ``acceptance_<depth>``: how often the draft at that depth is right, where those
        before were, from every token on; ``tokens_per_pass``: tokens that a pass of the target emits, the
        prompt's pass included; 0 for what was never asked.
    """
    figures = {}
    for level in range(1, depth + 1):
        reached = right = 0
        for row in hits:
            for i in range(len(row) - level + 1):
                if all(row[i : i + level - 1]):
                    reached += 1
                    right += row[i + level - 1]
        figures[f"acceptance_{level}"] = round(right / max(reached, 1), 4)
    tokens = sum(map(len, hits))
    passes = sum(_passes(row, depth) for row in hits)
    return figures | {"tokens_per_pass": round(tokens / max(passes, 1), 3)}


def _passes(row: Sequence[bool], depth: int) -> int:
    passes = place = 0
    while place < len(row):
        run = 0
        while run < depth and place + run < len(row) and row[place + run]:
            run += 1
        # The target's own token behind the last right draft is emitted too.
        place += run + 1
        passes += 1
    return passes
