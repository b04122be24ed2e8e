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


def block_figures(hits: Sequence[Sequence[Sequence[bool]]]) -> dict[str, float]:
    """Tokens per pass of blocks of K tokens that are drafted at once, along known answers.

    Args:
        hits: for each answer and each of its tokens in order, which of the K drafts from there on are right.

    Returns:
        ``tokens_per_pass``: of passes that begin where the one before ended; ``right_in_a_row``: how many
        drafts are right before the first wrong one, from every token on; 0 for what was never asked.
    """
    rows = [[_run(block) for block in blocks] for blocks in hits]
    passes = 0
    for runs in rows:
        place = 0
        while place < len(runs):
            place += runs[place] + 1
            passes += 1
    tokens = sum(map(len, rows))
    return {
        "tokens_per_pass": round(tokens / max(passes, 1), 3),
        "right_in_a_row": round(sum(map(sum, rows)) / max(tokens, 1), 3),
    }


def _run(hits: Sequence[bool]) -> int:
    return next((i for i, hit in enumerate(hits) if not hit), len(hits))


def _passes(row: Sequence[bool], depth: int) -> int:
    passes = place = 0
    while place < len(row):
        # The target's own token behind the last right draft is emitted too.
        place += _run(row[place : place + depth]) + 1
        passes += 1
    return passes
