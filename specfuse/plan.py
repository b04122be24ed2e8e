"""Should I speculate? Measures on a sample what passes and drafts cost and what drafts are worth."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from specfuse.drafters import CombinedDrafter, CorpusDrafter, Drafter, PromptLookupDrafter, resolve_drafter
from specfuse.probe import Pass, Probe, pass_times
from specfuse.speedup import WHY_THEY_DIFFER, simplified_speedup, standard_speedup

# Answers as units of the error of tokens per pass: passes of one answer are alike. Below this many answers
# passes have to do, and the error comes out too small.
MIN_CLUSTERS = 5


@dataclass(frozen=True)
class PlanRow:
    """One setting of ``max_nodes`` on the sample.

    Args:
        nodes: drafted tokens that a pass may verify.
        full_pass_ms: T(n), median time of a pass over n drafted tokens and the root: forward, verification,
            commit and bookkeeping.
        pass_ms: mean of T over the trees that the drafter really made.
        draft_ms: mean time of a proposal, the slowest twentieth left out.
        drafted_per_pass: mean width of those trees, the root not counted.
        tokens_per_pass: mean emitted tokens per pass and row.
        acceptance: by depth d = 1, 2, ...: how often a draft at depth d was right where the path had come
            to depth d - 1 and a draft stood there.
        speedup: ``tokens_per_pass * T(1) / (pass_ms + draft_ms)``; 1 is plain decoding, prefill left out.
        uncertainty: two standard errors of ``speedup``.
        measured: plain time per token over this setting's, both from the sample's own answers; not smoothed.
        alpha, gamma, cost_ratio: the same drafts seen as chains: acceptance over all depths, mean depth,
            drafting time per depth over T(1).
        standard, simplified: what the two formulas of ``specfuse.speedup`` make of these three.
    """

    nodes: int
    full_pass_ms: float
    pass_ms: float
    draft_ms: float
    drafted_per_pass: float
    tokens_per_pass: float
    acceptance: tuple[float, ...]
    speedup: float
    uncertainty: float
    measured: float
    alpha: float
    gamma: float
    cost_ratio: float
    standard: float
    simplified: float


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found.

    Args:
        plain_ms: T(1), median time of a pass without drafts.
        rows: one per setting, smallest first.
        best_nodes: the ``max_nodes`` with the largest expected speed-up among those that exceed 1 by more
            than their uncertainty, or None: do not speculate.
        answers, prompt_tokens, device, dtype: what was measured on.
    """

    plain_ms: float
    rows: tuple[PlanRow, ...]
    best_nodes: int | None
    answers: int
    prompt_tokens: int
    device: str
    dtype: str

    @property
    def best(self) -> PlanRow | None:
        """The row of ``best_nodes``."""
        return next((row for row in self.rows if row.nodes == self.best_nodes), None)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.best is None:
            return "Do not speculate: no setting is faster than plain decoding by more than its uncertainty."
        gain = f"{self.best.speedup:.2f}x (± {self.best.uncertainty:.2f}) of plain decoding"
        return f"Speculate with max_nodes={self.best_nodes}: expected {gain}."

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "verdict": self.verdict, "why_the_formulas_differ": WHY_THEY_DIFFER}

    def __str__(self) -> str:
        where = f"on {self.device} in {self.dtype}, {self.answers} answers, prompts of {self.prompt_tokens}"
        lines = [
            f"T(1) = {self.plain_ms:.2f} ms {where} tokens",
            "",
            "nodes   T(n) ms  draft ms  drafted  tokens/pass  S(n)          measured  standard  simplified"
            "  accepted at depth 1, 2, ...",
        ]
        for row in self.rows:
            depths = " ".join(f"{rate:.0%}" for rate in row.acceptance[:6])
            lines.append(
                f"{row.nodes:5}  {row.full_pass_ms:8.2f}  {row.draft_ms:8.3f}  {row.drafted_per_pass:7.1f}"
                f"  {row.tokens_per_pass:11.2f}  {row.speedup:4.2f} ± {row.uncertainty:4.2f}"
                f"   {row.measured:8.2f}  {row.standard:8.2f}  {row.simplified:10.2f}  {depths or '-'}"
            )
        notes = "S(n) = tokens/pass * T(1) / (T of the trees drafted + draft); prefill is not in it"
        return "\n".join([*lines, "", notes, self.verdict])


def plan(
    model: PreTrainedModel,
    inputs: Sequence[Mapping[str, Any]],
    drafter: Drafter | str = "auto",
    nodes: Sequence[int] = (2, 4, 8, 16, 32, 64),
    *,
    max_new_tokens: int = 64,
    rounds: int = 15,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> Plan:
    """Measures on a sample of inputs which tree size pays, if any.

    First passes over chains of each length are timed on the real cache at the sample's prompts, taking
    turns. Then every input is answered once plainly and once per setting, through the real loop with a draft
    in every pass: a smaller tree is not always a part of a larger one, so each setting gets its own run. The
    drafter learns an answer once, after all settings have given it: each meets what the others meet, a
    drafter that remembers as cold as in a first run over the sample in this order.

    ``generate`` may do better than a row says where drafts fail: it rests a drafter that is never right.

    Args:
        model: the target.
        inputs: keyword arguments of ``model.generate``, one mapping per call: the more, and the more
            like what will be asked, the better.
        drafter: as for :func:`specfuse.generate`, but ``"auto"`` and ``"corpus"`` are new ones that forget
            everything afterwards. A :class:`Drafter` object learns the sample's answers.
        nodes: settings of ``max_nodes`` to try, each from 1 to 1023.
        max_new_tokens: length of answers where a mapping does not say.
        rounds: timed passes of each width, at least 3.
        seed: of the sampling, where a mapping asks for sampling.
        progress: called after each of the ``1 + len(inputs) * (1 + len(nodes))`` steps.

    Returns:
        A :class:`Plan`. Errors are two standard errors by first-order propagation: of the tokens per pass
        (between answers where there are at least 5, else between passes), of the median pass times (1.2533
        standard errors of a mean) and of the mean drafting time, taken as independent.

    Raises:
        ValueError: an empty sample, an unknown drafter or none, ``nodes`` or ``rounds`` out of range, or
            answers without a second token.
    """
    sample = _check(inputs, nodes, rounds, max_new_tokens)
    sizes = sorted(set(nodes))
    used = _fresh(drafter, model)
    # The noise is keyed by the seed: every setting draws the same answer.
    sample = [{"max_new_tokens": max_new_tokens, "seed": seed, **each} for each in sample]
    curve = _Curve(pass_times(model, sample, [0, *sizes], rounds))
    progress()
    records = _run_all(model, sample, used, [0, *sizes], progress)
    rows = tuple(_row(size, records[size], records[0], curve) for size in sizes)
    paying = [row for row in rows if row.speedup - row.uncertainty > 1]
    best = max(paying, key=lambda row: row.speedup, default=None)
    return Plan(
        plain_ms=curve.at(1),
        rows=rows,
        best_nodes=None if best is None else best.nodes,
        answers=sum(record.answers for record in records[0]),
        prompt_tokens=round(statistics.median(record.prompt for record in records[0])),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
    )


@dataclass(frozen=True)
class _Record:
    """One call of generation."""

    passes: list[Pass]
    offered: Counter[int]
    accepted: Counter[int]
    answers: int
    prompt: int


class _Curve:
    """T by width: medians of the measured widths, straight lines between them."""

    def __init__(self, times: Mapping[int, Sequence[float]]):
        self.widths = [length + 1 for length in times]
        self.medians = [statistics.median(each) for each in times.values()]
        # A median's standard error is 1.2533 times a mean's (for normal noise); the spread is taken from the
        # median deviation, because single passes are late by any amount.
        self.errors = [1.2533 * _spread(each) / math.sqrt(len(each)) for each in times.values()]

    def at(self, width: float) -> float:
        return float(np.interp(width, self.widths, self.medians))

    def error(self, width: float) -> float:
        return float(np.interp(width, self.widths, self.errors))


def _spread(values: Sequence[float]) -> float:
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values)


def _run_all(
    model: PreTrainedModel,
    sample: Sequence[Mapping[str, Any]],
    drafter: Drafter,
    sizes: Sequence[int],
    progress: Callable[[], object],
) -> dict[int, list[_Record]]:
    """The sample's answers by setting; 0 is plain decoding."""
    records: dict[int, list[_Record]] = {size: [] for size in sizes}
    for index, inputs in enumerate(sample):
        turn = index % len(sizes)
        for size in [*sizes[turn:], *sizes[:turn]]:
            probe = Probe(model, drafter if size else None, max(size, 1))
            answers = probe.run(inputs)
            prompt = max(map(len, probe.prompts))
            record = _Record(probe.passes, probe.offered, probe.accepted, len(answers), prompt)
            records[size].append(record)
            progress()
        for answer, question in zip(answers, probe.questions, strict=True):
            drafter.observe(answer, question=question)
    return records


def _row(nodes: int, records: Sequence[_Record], plain: Sequence[_Record], curve: _Curve) -> PlanRow:
    passes = [each for record in records for each in record.passes]
    tokens_per_pass, tokens_error = _tokens_per_pass(records)
    widths = [each.width for each in passes]
    pass_ms = statistics.fmean(map(curve.at, widths))
    # A mean, since a drafter may be quick in most passes and slow in some; the machine's stalls are cut off.
    drafting = sorted(each.draft_ms for each in passes)[: math.ceil(0.95 * len(passes))]
    draft_ms = statistics.fmean(drafting)
    draft_error = statistics.stdev(drafting) / math.sqrt(len(drafting)) if len(drafting) > 1 else 0.0
    cost_error = math.hypot(statistics.fmean(map(curve.error, widths)), draft_error)
    speedup = tokens_per_pass * curve.at(1) / (pass_ms + draft_ms)
    relative = (
        tokens_error / tokens_per_pass,
        curve.error(1) / curve.at(1),
        cost_error / (pass_ms + draft_ms),
    )
    offered = sum((record.offered for record in records), Counter())
    accepted = sum((record.accepted for record in records), Counter())
    alpha = accepted.total() / offered.total() if offered else 0.0
    gamma = statistics.fmean(each.depth for each in passes)
    cost_ratio = draft_ms / gamma / curve.at(1) if gamma else 0.0
    return PlanRow(
        nodes=nodes,
        full_pass_ms=curve.at(nodes + 1),
        pass_ms=pass_ms,
        draft_ms=draft_ms,
        drafted_per_pass=statistics.fmean(widths) - 1,
        tokens_per_pass=tokens_per_pass,
        acceptance=tuple(accepted[depth] / offered[depth] for depth in sorted(offered)),
        speedup=speedup,
        uncertainty=2 * speedup * math.hypot(*relative),
        measured=_ms_per_token(plain) / _ms_per_token(records),
        alpha=alpha,
        gamma=gamma,
        cost_ratio=cost_ratio,
        standard=standard_speedup(alpha, gamma, cost_ratio),
        simplified=simplified_speedup(alpha, gamma, cost_ratio),
    )


def _tokens_per_pass(records: Sequence[_Record]) -> tuple[float, float]:
    """Mean emitted tokens per pass and row, and its standard error (of a ratio, by linearisation)."""
    units = [record.passes for record in records if record.passes]
    if len(units) < MIN_CLUSTERS:
        units = [[each] for passes in units for each in passes]
    tokens = [sum(each.emitted for each in unit) for unit in units]
    passes = [sum(each.rows for each in unit) for unit in units]
    mean, count = sum(tokens) / sum(passes), len(units)
    squares = sum((t - mean * p) ** 2 for t, p in zip(tokens, passes, strict=True))
    return mean, math.sqrt(squares * count / max(count - 1, 1)) / sum(passes)


def _ms_per_token(records: Sequence[_Record]) -> float:
    passes = [each for record in records for each in record.passes]
    return sum(each.draft_ms + each.pass_ms for each in passes) / sum(each.emitted for each in passes)


def _fresh(drafter: Drafter | str | None, model: PreTrainedModel) -> Drafter:
    if drafter is None or drafter == "none":
        raise ValueError(f"drafter must draft, got {drafter!r}: plain decoding is what it is compared with")
    # What the model's own drafter has learned, the sample's answers perhaps, would be counted as foresight.
    if isinstance(drafter, str) and drafter in ("auto", "corpus"):
        corpus = CorpusDrafter()
        return corpus if drafter == "corpus" else CombinedDrafter([corpus, PromptLookupDrafter()])
    resolved = resolve_drafter(drafter, model)
    assert resolved is not None
    return resolved


def _check(
    inputs: Sequence[Mapping[str, Any]], nodes: Sequence[int], rounds: int, max_new_tokens: int
) -> list[Mapping[str, Any]]:
    if isinstance(inputs, Mapping) or not all(isinstance(each, Mapping) for each in inputs):
        raise ValueError(f"inputs must be a sequence of mappings, one per call, got {type(inputs).__name__}")
    if not len(inputs):
        raise ValueError("inputs must hold at least one mapping, got an empty sample")
    if not len(nodes) or not all(isinstance(n, int) and 1 <= n <= 1023 for n in nodes):
        raise ValueError(f"nodes must be ints from 1 to 1023, at least one, got {nodes!r}")
    if not isinstance(rounds, int) or rounds < 3:
        raise ValueError(f"rounds must be an int of at least 3, got {rounds!r}")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 2:
        raise ValueError(f"max_new_tokens must be an int of at least 2, got {max_new_tokens!r}")
    return list(inputs)
