"""``verify_tree_rejection`` emits the target: exact enumeration, chi-square, and rules that fail."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import pytest
import torch
from scipy import stats
from torch import Tensor
from verify_tree_cases import parent_arrays
from verify_tree_rejection_cases import WITH, draw_siblings, op_arguments, to_sparse

from specfuse.kernels.philox_ref import COIN, RESIDUAL, TARGET, gumbel
from specfuse.kernels.verify_tree_ref import filter_logits
from specfuse.kernels.verify_tree_rejection_ref import accept_child, verify_tree_rejection_ref
from specfuse.ops import native

op = torch.ops.specfuse.verify_tree_rejection.default
replacement = pytest.mark.parametrize("with_replacement", WITH.values(), ids=WITH.keys())
Tokens = tuple[int, ...]
# (p, q, drafts, with replacement) -> the probability that each draft is the one accepted, and what is then
# left of p where none is.
Rule = Callable[[Tensor, Tensor, list[int], bool], tuple[list[float], Tensor]]

RULES = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.6},
    "top-k": {"temperature": 1.0, "top_k": 2},
    "all": {"temperature": 0.9, "top_k": 3, "top_p": 0.9, "min_p": 0.05},
}


# ---------------------------------------------------------------- exact enumeration over a tiny language


V = 3
MODELS = {
    name: torch.randn(2, V + 1, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for name, seed in (("one", 5), ("other", 0))
}  # logits of target and drafter by the last token, V at the root


def target(model: str, rule: dict[str, float], last: int) -> Tensor:
    filters = (int(rule.get("top_k", 0)), rule.get("top_p", 1.0), rule.get("min_p", 0.0))
    return filter_logits(2 * MODELS[model][0, last] / rule["temperature"], *filters).softmax(-1)


def implemented(
    p: Tensor, q: Tensor, drafts: list[int], with_replacement: bool
) -> tuple[list[float], Tensor]:
    """The reference's rule with its coins integrated out: where each coin's decision flips is asked of it."""
    probabilities, reached, left = [], 1.0, p
    for i, token in enumerate(drafts):
        drawable = q.clone()
        if not with_replacement:
            drawable[drafts[:i]] = 0.0
        share = float(drawable[token] / drawable.sum()) if drawable[token] > 0 else 0.0
        accepts = min(1.0, float(left[token]) / share) if share else 0.0
        rejecting = [math.nextafter(1.0, 0.0)] * i
        for coin, decision in ((accepts * (1 - 1e-9), True), (accepts * (1 + 1e-9), False)):
            if share and coin < 1.0 and (coin > 0.0 or not decision):
                taken, _ = accept_child(p, q, drafts[: i + 1], [*rejecting, coin], with_replacement)
                assert taken == (i if decision else None), (p, q, drafts, i, coin)
        probabilities.append(reached * accepts)
        reached *= 1.0 - accepts
        if reached < 1e-12:  # never comes to what follows
            return [*probabilities, *[0.0] * (len(drafts) - i - 1)], p
        _, left = accept_child(
            p, q, drafts[: i + 1], [*rejecting, math.nextafter(1.0, 0.0)], with_replacement
        )
    return probabilities, left


def sibling_draws(q: Tensor, count: int, with_replacement: bool) -> Iterator[tuple[list[int], float]]:
    """Every ordered draw of siblings with its probability; what q cannot provide is token 0."""
    for drafts in product(range(V), repeat=count):
        probability, drawable = 1.0, q.clone()
        for token in drafts:
            total = float(drawable.sum())
            probability *= float(drawable[token]) / total if total > 0 else float(token == 0)
            if not with_replacement:
                drawable[token] = 0.0
        if probability > 0.0:
            yield list(drafts), probability


def emitted(
    rule: Rule, model: str, filters: dict[str, float], parents: Tokens, replace: bool
) -> dict[Tokens, float]:
    """The distribution of the first tokens after the root, one more than the tree is deep.

    Where the walk ends early the sequence continues with plain draws from the target.
    """
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    length = max(depths) + 1
    total: dict[Tokens, float] = defaultdict(float)

    @cache
    def p_after(last: int) -> Tensor:
        return target(model, filters, last)

    @cache
    def decisions(last: int, count: int) -> list[tuple[list[int], float, list[float], Tensor]]:
        q = MODELS[model][1, last].softmax(-1)
        if count == 2:
            q = q.index_fill(0, torch.tensor(last % V), 0.0)  # tokens that are never drafted
        return [
            (drafts, mass, *rule(p_after(last), q, drafts, replace))
            for drafts, mass in sibling_draws(q, count, replace)
        ]

    def plain(sequence: Tokens, mass: float) -> None:
        if len(sequence) == length:
            total[sequence] += mass
            return
        for token in range(V):
            plain((*sequence, token), mass * float(p_after(sequence[-1])[token]))

    def expand(node: int, sequence: Tokens, mass: float) -> None:
        last = sequence[-1] if sequence else V
        children = [c for c in range(len(parents)) if parents[c] == node]
        for drafts, drawn, probabilities, left in decisions(last, len(children)):
            for child, token, accepted in zip(children, drafts, probabilities, strict=True):
                if accepted > 0.0:
                    expand(child, (*sequence, token), mass * drawn * accepted)
            rest = mass * drawn * (1.0 - sum(probabilities))
            for token in range(V):
                if rest > 1e-15 and left[token] > 0.0:
                    plain((*sequence, token), rest * float(left[token]))

    expand(0, (), 1.0)
    return total


def largest_error(total: dict[Tokens, float], model: str, filters: dict[str, float]) -> float:
    """Between ``total`` and the target's own distribution over sequences of that length."""
    worst = 0.0
    for sequence in product(range(V), repeat=len(next(iter(total)))):
        exact, last = 1.0, V
        for token in sequence:
            exact *= float(target(model, filters, last)[token])
            last = token
        worst = max(worst, abs(total.get(sequence, 0.0) - exact))
    return worst


@pytest.mark.parametrize("N", [1, 2, 3, 4, 5])
@replacement
def test_every_small_tree_emits_the_target(N: int, with_replacement: bool) -> None:
    """All trees of N nodes, every draw of every sibling, all coins integrated out."""
    for parents in parent_arrays(N):
        total = emitted(implemented, "one", RULES["plain"], parents, with_replacement)
        assert largest_error(total, "one", RULES["plain"]) < 1e-9, parents


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("parents", [(-1, 0, 1), (-1, 0, 0), (-1, 0, 0, 0, 0), (-1, 0, 0, 1, 1)], ids=str)
@replacement
def test_filtered_targets_are_emitted(name: str, parents: Tokens, with_replacement: bool) -> None:
    total = emitted(implemented, "other", RULES[name], parents, with_replacement)
    assert largest_error(total, "other", RULES[name]) < 1e-9


# ---------------------------------------------------------------- wrong rules must fail


def wrong_rule(
    fresh_q: bool = False, fresh_p: bool = False, unnormalised: bool = False, coin: bool = False
) -> Rule:
    """The rule written again with one mistake: q or p not updated, not normalised, or the ratio left out."""

    def rule(p: Tensor, q: Tensor, drafts: list[int], with_replacement: bool) -> tuple[list[float], Tensor]:
        probabilities, reached, left, drawable = [], 1.0, p, q.clone()
        for token in drafts:
            share = drawable / drawable.sum() if drawable.sum() > 0 else drawable
            if not share[token] > 0:
                probabilities.append(0.0)
                continue
            accepts = float(left[token]) if coin else min(1.0, float(left[token] / share[token]))
            probabilities.append(reached * accepts)
            reached *= 1.0 - accepts
            rest = (left - share).clamp_min(0.0)
            if not fresh_p and rest.sum() > 0:
                left = rest if unnormalised else rest / rest.sum()
            if not with_replacement and not fresh_q:
                drawable[token] = 0.0
        return probabilities, left / left.sum()

    return rule


STAR = (-1, 0, 0, 0)


@replacement
def test_the_rule_written_again_passes(with_replacement: bool) -> None:
    total = emitted(wrong_rule(), "one", RULES["plain"], STAR, with_replacement)
    assert largest_error(total, "one", RULES["plain"]) < 1e-9


@pytest.mark.parametrize("mistake", ["fresh_q", "fresh_p", "unnormalised", "coin"])
@replacement
def test_wrong_rules_fail(mistake: str, with_replacement: bool) -> None:
    if mistake == "fresh_q" and with_replacement:
        pytest.skip("is the right rule")
    total = emitted(wrong_rule(**{mistake: True}), "one", RULES["plain"], STAR, with_replacement)
    assert largest_error(total, "one", RULES["plain"]) > 1e-3


def test_only_one_of_the_two_kinds_of_replacement_can_be_mistaken() -> None:
    """Siblings drawn without must not be verified as drawn with; the other way round is exact as well.

    A draw with replacement that is not a repeat follows q without the elder siblings, and repeats are passed
    over.
    """
    other: Rule = lambda p, q, drafts, replace: implemented(p, q, drafts, not replace)  # noqa: E731
    without, with_ = (emitted(other, "one", RULES["plain"], STAR, drawn) for drawn in (False, True))
    assert largest_error(without, "one", RULES["plain"]) > 1e-3
    assert largest_error(with_, "one", RULES["plain"]) < 1e-9


# ---------------------------------------------------------------- the implementations, by chi-square


WIDE = 6
TREE = [-1, 0, 0, 0, 1, 1, 2]
ROWS = 20_000 if native.cpu is not None else 1_500  # the eager reference takes two milliseconds per row
WIDE_LOGITS = torch.randn(2, WIDE + 1, WIDE, generator=torch.Generator().manual_seed(40)) * 1.3


def draft(rows: int, with_replacement: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Trees drawn level by level: tokens [B, N], logits of the target [B, N, V], q [B, N, V]."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.full((rows, len(TREE)), WIDE)
    q = WIDE_LOGITS[1].softmax(-1)
    for node in range(len(TREE)):
        children = [c for c, parent in enumerate(TREE) if parent == node]
        if children:
            tokens[:, children] = draw_siblings(
                q[tokens[:, node]], len(children), with_replacement, generator
            )
    return tokens, WIDE_LOGITS[0][tokens], q[tokens]


def wide_target(rule: dict[str, float]) -> Tensor:
    """[V + 1, V] float64."""
    filters = (int(rule.get("top_k", 0)), rule.get("top_p", 1.0), rule.get("min_p", 0.0))
    z = WIDE_LOGITS[0].double() / rule["temperature"]
    return torch.stack([filter_logits(row, *filters) for row in z]).softmax(-1)


def sequences(outputs: tuple[Tensor, ...], tokens: Tensor, rule: dict[str, float]) -> list[Tokens]:
    """The first two tokens of each row, the second drawn from the target where the walk gave one only."""
    path, length, next_token, _ = outputs
    drafted = tokens.gather(1, path.long().clamp_min(0))
    first = torch.where(length > 1, drafted[:, 1], next_token)
    second = torch.where(length > 2, drafted[:, -1 if path.shape[1] < 3 else 2], next_token)
    plain = torch.multinomial(wide_target(rule)[first], 1, generator=torch.Generator().manual_seed(12))
    second = torch.where(length == 1, plain.squeeze(1), second)
    return list(zip(first.tolist(), second.tolist(), strict=True))


def p_value(drawn: list[Tokens], rule: dict[str, float]) -> float:
    """Chi-square against the target, rare pairs pooled; 0 if something impossible was drawn."""
    p = wide_target(rule)
    exact = {(a, b): float(p[WIDE, a] * p[a, b]) for a in range(WIDE) for b in range(WIDE)}
    counts = Counter(drawn)
    if any(exact[pair] == 0.0 for pair in counts):
        return 0.0
    common = [pair for pair, mass in exact.items() if mass * len(drawn) >= 5]
    observed = [counts[pair] for pair in common]
    expected = [exact[pair] * len(drawn) for pair in common]
    rest = len(drawn) - sum(expected)
    if rest > 1e-6 * len(drawn):
        observed.append(len(drawn) - sum(observed))
        expected.append(rest)
    return float(stats.chisquare(observed, expected, sum_check=False).pvalue)


def verified(
    implementation: Callable, rows: int, with_replacement: bool, rule: dict[str, float], sparse: bool = False
) -> list[Tokens]:
    tokens, logits, q = draft(rows, with_replacement)
    parents = torch.tensor(TREE, dtype=torch.int32).expand(rows, -1).contiguous()
    probs, ids = to_sparse(q, WIDE) if sparse else (q, None)
    args = op_arguments(logits, probs, ids, with_replacement, tokens, parents, **rule)
    return sequences(implementation(*args), tokens, rule)


@pytest.mark.skipif(native.cpu is None, reason="the op is the reference, which is tested below")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@replacement
def test_the_op_draws_from_the_target(name: str, sparse: bool, with_replacement: bool) -> None:
    drawn = verified(op, ROWS, with_replacement, RULES[name], sparse)
    assert p_value(drawn, RULES[name]) > 1e-3


@replacement
def test_the_reference_draws_from_the_target(with_replacement: bool) -> None:
    drawn = verified(verify_tree_rejection_ref, 600, with_replacement, RULES["plain"])
    assert p_value(drawn, RULES["plain"]) > 1e-3


@pytest.mark.parametrize("name", ["plain", "all"])
def test_the_op_told_the_wrong_kind_of_replacement_fails(name: str) -> None:
    wrong = lambda logits, q, ids, replace, *rest: op(logits, q, ids, not replace, *rest)  # noqa: E731
    assert p_value(verified(wrong, ROWS, False, RULES[name]), RULES[name]) < 1e-6
    assert p_value(verified(wrong, ROWS, True, RULES[name]), RULES[name]) > 1e-3


def test_the_op_told_the_wrong_q_fails() -> None:
    """As a drafter does that reports its probabilities at another temperature."""
    wrong = lambda logits, q, *rest: op(logits, q.sqrt(), *rest)  # noqa: E731
    assert p_value(verified(wrong, ROWS, False, RULES["plain"]), RULES["plain"]) < 1e-6


# ---------------------------------------------------------------- the drafter's noise


def chain_with_noise(stream: int) -> float:
    """The p-value of chains of one draft, drawn by Gumbel-argmax with the noise of ``stream`` and the seeds.

    The draft stands at the position of the first emitted token. Token 0, which shares its word with the
    first coin, is drafted more often than p says.
    """
    rule = RULES["plain"]
    seeds = torch.arange(ROWS)
    q = WIDE_LOGITS[1, WIDE].softmax(-1)
    noise = gumbel(seeds[:, None], torch.tensor(1), torch.arange(WIDE), stream)
    tokens = torch.stack([torch.full((ROWS,), WIDE), (q.log() + noise).argmax(-1)], dim=1)
    parents = torch.tensor([-1, 0], dtype=torch.int32).expand(ROWS, -1).contiguous()
    logits = WIDE_LOGITS[0][tokens]
    outputs = op(*op_arguments(logits, q.expand(ROWS, 2, WIDE), None, False, tokens, parents, **rule))
    return p_value(sequences(outputs, tokens, rule), rule)


def test_a_drafter_may_use_the_noise_of_verify_tree() -> None:
    assert chain_with_noise(TARGET) > 1e-3


@pytest.mark.parametrize("stream", [COIN, RESIDUAL])
def test_a_drafter_that_uses_this_ops_noise_fails(stream: int) -> None:
    """What the streams are for: drafts and decisions from the same words are not independent."""
    assert chain_with_noise(stream) < 1e-6


# ---------------------------------------------------------------- how much is accepted


def accepted_mass(p: Tensor, q: Tensor, count: int, with_replacement: bool) -> tuple[float, float]:
    """The probability that one of ``count`` siblings is accepted, by this rule and by verify_tree's."""
    by_rule = by_target = 0.0
    for drafts, mass in sibling_draws(q, count, with_replacement):
        by_rule += mass * sum(implemented(p, q, drafts, with_replacement)[0])
        by_target += mass * float(p[sorted(set(drafts))].sum())
    return by_rule, by_target


@pytest.mark.parametrize("count", [1, 2, 3])
@replacement
def test_accepts_at_least_as_much_as_the_target_only_rule(count: int, with_replacement: bool) -> None:
    """For each of 60 random p and q, averaged over the draws of the siblings."""
    generator = torch.Generator().manual_seed(count)
    gains = []
    for _ in range(60):
        p, q = (torch.randn(2, V, dtype=torch.float64, generator=generator) * 1.5).softmax(-1)
        by_rule, by_target = accepted_mass(p, q, count, with_replacement)
        gains.append(by_rule - by_target)
    assert min(gains) > -1e-9
    everything = count == V and not with_replacement  # is drafted: both accept always
    assert everything or sum(gains) / len(gains) > 0.05
