"""``verify_tree`` draws from the target: chi-square against exact distributions, and rules that fail it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor
from verify_tree_cases import arguments, emitted

from specfuse.kernels.verify_tree_ref import filter_logits
from specfuse.ops import native

op = torch.ops.specfuse.verify_tree.default
Outcome = tuple[int, ...]

V = 5
ROWS = (
    20_000 if native.cpu is not None else 4_000
)  # the eager reference takes a fifth of a millisecond per row
# Three siblings under the root, two under each of two of them: depth 2, leaves at depths 1 and 2.
PARENTS = [-1, 0, 0, 0, 1, 1, 2, 2]
TOKENS = [0, 1, 2, 3, 1, 2, 0, 4]
LOGITS = torch.randn(len(TOKENS), V, generator=torch.Generator().manual_seed(7)) * 1.2

RULES = {
    "plain": {"temperature": 1.0},
    "warm": {"temperature": 1.7},
    "top-k": {"temperature": 1.0, "top_k": 3},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "min-p": {"temperature": 1.2, "min_p": 0.25},
    "all": {"temperature": 0.9, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def probabilities(rule: dict[str, float]) -> Tensor:
    """The target's distribution after each node, [N, V] float64."""
    z = LOGITS.double() / rule["temperature"]
    filters = (int(rule.get("top_k", 0)), rule.get("top_p", 1.0), rule.get("min_p", 0.0))
    return torch.stack([filter_logits(row, *filters) for row in z]).softmax(-1)


def exact_outcomes(rule: dict[str, float]) -> dict[Outcome, float]:
    """Every sequence that can be emitted, up to where it leaves the tree, with its probability."""
    p = probabilities(rule)
    outcomes: dict[Outcome, float] = {}

    def expand(node: int, emitted_so_far: Outcome, mass: float) -> None:
        for token in range(V):
            sequence, q = (*emitted_so_far, token), mass * float(p[node, token])
            children = [c for c in range(len(TOKENS)) if PARENTS[c] == node and TOKENS[c] == token]
            if children:
                expand(children[0], sequence, q)
            elif q > 0.0:
                outcomes[sequence] = q

    expand(0, (), 1.0)
    assert abs(sum(outcomes.values()) - 1.0) < 1e-12
    return outcomes


def draw_with_op(rule: dict[str, float]) -> list[Outcome]:
    tokens = torch.tensor(TOKENS).expand(ROWS, -1).contiguous()
    parents = torch.tensor(PARENTS, dtype=torch.int32).expand(ROWS, -1).contiguous()
    args = arguments(LOGITS.expand(ROWS, -1, -1), tokens, parents, **rule)
    return [tuple(sequence) for sequence in emitted(op(*args), tokens)]


def p_value(drawn: list[Outcome], exact: dict[Outcome, float]) -> float:
    """Chi-square with rare outcomes pooled; 0 if something impossible was drawn."""
    counts = Counter(drawn)
    if any(outcome not in exact for outcome in counts):
        return 0.0
    common = [o for o, p in exact.items() if p * len(drawn) >= 5]
    observed = [counts[o] for o in common]
    expected = [exact[o] * len(drawn) for o in common]
    rest = len(drawn) - sum(expected)
    if rest > 1e-6 * len(drawn):
        observed.append(len(drawn) - sum(observed))
        expected.append(rest)
    return float(stats.chisquare(observed, expected, sum_check=False).pvalue)


@rules
def test_emitted_sequences_follow_the_target_exactly(rule: dict[str, float]) -> None:
    exact = exact_outcomes(rule)
    assert max(len(o) for o in exact) == 3  # two levels of drafts and the token behind them
    assert sum(float(probabilities(rule)[0, t]) > 0 for t in TOKENS[1:4]) >= 2  # siblings that compete
    assert p_value(draw_with_op(rule), exact) > 1e-3


@rules
def test_neighbouring_rows_and_positions_are_independent(rule: dict[str, float]) -> None:
    """First tokens at one position from seeds s and s + 1, and at positions t and t + 1 from one seed."""
    tokens, parents = torch.zeros(ROWS, 1, dtype=torch.int64), torch.full((ROWS, 1), -1, dtype=torch.int32)
    logits = LOGITS[:1].expand(ROWS, 1, V)
    by_seed = op(*arguments(logits, tokens, parents, **rule))[2]
    by_position = op(*arguments(logits, tokens, parents, positions=torch.arange(ROWS), seed=3, **rule))[2]
    p = probabilities(rule)[0]
    pairs = {(a, b): float(p[a] * p[b]) for a in range(V) for b in range(V) if p[a] * p[b] > 0}
    for draws in (by_seed.tolist(), by_position.tolist()):
        assert p_value(list(zip(draws[::2], draws[1::2], strict=True)), pairs) > 1e-3


@rules
def test_plain_sampling_has_the_same_distribution_and_tokens(rule: dict[str, float]) -> None:
    """Token by token through one-node trees with the same seeds: equal in every row."""
    drawn = draw_with_op(rule)
    nodes, plain = [0] * ROWS, [()] * ROWS
    for depth in range(3):
        rows = [b for b in range(ROWS) if nodes[b] >= 0]
        logits = LOGITS[[nodes[b] for b in rows]].unsqueeze(1)
        root = torch.full((len(rows), 1), -1, dtype=torch.int32)
        args = arguments(logits, torch.zeros(len(rows), 1).long(), root, seed=rows, positions=depth, **rule)
        for b, token in zip(rows, op(*args)[2].tolist(), strict=True):
            plain[b] = (*plain[b], token)
            children = [c for c in range(len(TOKENS)) if PARENTS[c] == nodes[b] and TOKENS[c] == token]
            nodes[b] = children[0] if children else -1
    assert plain == drawn


# ---------------------------------------------------------------- wrong rules must fail the same test


def _walk(
    choose: Callable[[Tensor, list[int], torch.Generator], int], rule: dict[str, float]
) -> list[Outcome]:
    """Draws with ``choose(p, children, generator) -> token`` at each node."""
    p, generator, drawn = probabilities(rule), torch.Generator().manual_seed(1), []
    for _ in range(10_000):
        node, sequence = 0, ()
        while node >= 0:
            children = [c for c in range(len(TOKENS)) if PARENTS[c] == node]
            token = choose(p[node], children, generator)
            sequence = (*sequence, token)
            node = next((c for c in children if TOKENS[c] == token), -1)
        drawn.append(sequence)
    return drawn


def one_draw(p: Tensor, children: list[int], generator: torch.Generator) -> int:
    """The right rule: one token per node, whatever the children hold."""
    return int(torch.multinomial(p, 1, generator=generator))


def a_coin_per_sibling(p: Tensor, children: list[int], generator: torch.Generator) -> int:
    """Wrong: each sibling tested with its own coin against p, then a fresh draw if none is taken."""
    for child in children:
        if float(torch.rand(1, generator=generator)) < float(p[TOKENS[child]]):
            return TOKENS[child]
    return one_draw(p, children, generator)


def residual_without_renormalising(p: Tensor, children: list[int], generator: torch.Generator) -> int:
    """Wrong: siblings tested against p (not against what is left of it), the rest drawn without them."""
    left = p.clone()
    for child in children:
        if float(torch.rand(1, generator=generator)) < float(p[TOKENS[child]]):
            return TOKENS[child]
        left[TOKENS[child]] = 0.0
    return int(torch.multinomial(left if float(left.sum()) > 0 else p, 1, generator=generator))


def siblings_counted_twice(p: Tensor, children: list[int], generator: torch.Generator) -> int:
    """Wrong: a drafted token weighs twice, as duplicate siblings do where each is tried."""
    doubled = p.clone()
    doubled[[TOKENS[c] for c in children]] *= 2.0
    return int(torch.multinomial(doubled, 1, generator=generator))


@rules
def test_the_right_rule_passes_by_hand(rule: dict[str, float]) -> None:
    assert p_value(_walk(one_draw, rule), exact_outcomes(rule)) > 1e-3


@pytest.mark.parametrize(
    "wrong", [a_coin_per_sibling, residual_without_renormalising, siblings_counted_twice]
)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_wrong_sibling_rules_fail(wrong: Callable[..., int], name: str) -> None:
    assert p_value(_walk(wrong, RULES[name]), exact_outcomes(RULES[name])) < 1e-6


@pytest.mark.parametrize("name", ["warm", "top-k", "top-p", "min-p", "all"])
def test_leaving_out_a_filter_fails(name: str) -> None:
    assert p_value(draw_with_op(RULES["plain"]), exact_outcomes(RULES[name])) < 1e-6
