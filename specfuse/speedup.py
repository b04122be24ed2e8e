"""Expected speed-up of speculation, in closed form: numbers in, a number out."""

from __future__ import annotations

WHY_THEY_DIFFER = (
    "standard = (1 - a^(g+1)) / ((1 - a)(g c + 1)) credits a pass with 1 + a + ... + a^g tokens, because the "
    "first rejection discards every draft behind it and the target adds a token of its own, and charges all "
    "g drafts; simplified = g / (1 + g (1 - a) c) credits every pass with all g drafts whatever a is, leaves "
    "the target's own token out, and charges only the g (1 - a) drafts that a rejects, so that it promises "
    "more than 1 even where nothing is accepted (a = 0, g (1 - c) > 1); both take a pass over g + 1 tokens "
    "to cost T(1), which S(n) measures instead."
)
"""Why the two formulas for chains disagree, in one sentence."""


def standard_speedup(alpha: float, gamma: float, cost_ratio: float) -> float:
    """``(1 - alpha^(gamma + 1)) / ((1 - alpha) (gamma * cost_ratio + 1))``.

    Args:
        alpha: chance that a draft is accepted where all before it were, 0 to 1.
        gamma: drafted tokens per pass, at least 0; a mean need not be whole.
        cost_ratio: time of one drafted token over the time of one pass of the target.

    Returns:
        Expected speed-up of a chain of independent drafts where a pass costs the same for any width.

    Raises:
        ValueError: an argument outside its range.

    Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023, Theorem 3.8.
    """
    _check(alpha, gamma, cost_ratio)
    # At alpha = 1 the quotient is 0 / 0; its limit is the number of terms.
    tokens = gamma + 1 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)
    return tokens / (gamma * cost_ratio + 1)


def simplified_speedup(alpha: float, gamma: float, cost_ratio: float) -> float:
    """``gamma / (1 + gamma (1 - alpha) * cost_ratio)``: often quoted, and too kind; see ``WHY_THEY_DIFFER``.

    Arguments and errors as for :func:`standard_speedup`.
    """
    _check(alpha, gamma, cost_ratio)
    return gamma / (1 + gamma * (1 - alpha) * cost_ratio)


def _check(alpha: float, gamma: float, cost_ratio: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    if not cost_ratio >= 0:
        raise ValueError(f"cost_ratio must not be negative, got {cost_ratio}")
