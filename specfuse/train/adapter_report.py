"""How close an adapter brings a drafter to its target on held-out clips: ``specfuse align report``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specfuse.adapters import AdapterModel, kind_of
from specfuse.ops.adapter_cosine import adapter_cosine
from specfuse.train.adapter_losses import logits_of, run_adapter, target_of
from specfuse.train.adapter_pairs import Pairs, fit_width
from specfuse.train.adapter_tokens import TokenScores, block_report, rounded

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
PERCENTILES = (10, 25, 50, 75, 90, 95, 99)
ROWS = ("before", "context", "constant", "after")
CENTRED = {"before": "b_centred", "after": "centred"}
FUSED = ("linear", "residual-mlp", "lightweight")

# The published alignment of EventGPT with Video-LLaVA, 1,042 held-out samples of DSEC, features of 150,528
# raw pixels: github.com/xifan-zhang/EventGPT, feasible/feature_alignment/light_adapter.md.
PUBLISHED: dict[str, Any] = {
    "samples": 1042,
    "before": {
        "mean": 0.6461,
        "std": 0.1016,
        "min": 0.275,
        "max": 0.861,
        "accepted": dict(zip(THRESHOLDS, (0.917, 0.737, 0.316, 0.022, 0.002, 0.0, 0.0), strict=True)),
    },
    "after": {
        "mean": 0.8842,
        "std": 0.0762,
        "min": 0.505,
        "max": 0.977,
        "percentiles": dict(
            zip(PERCENTILES, (0.7645, 0.8582, 0.9098, 0.9382, 0.9532, 0.9599, 0.9687), strict=True)
        ),
        "accepted": dict(zip(THRESHOLDS, (1.0, 0.995, 0.964, 0.857, 0.775, 0.553, 0.131), strict=True)),
    },
}


def align_report(adapter: AdapterModel, pairs: Pairs) -> dict[str, Any]:
    """The figures of an adapter on the held-out samples.

    Cosine similarity with the target of what comes from the drafter as it is ("before"), from the adapter
    ("after"), and of the mean target of training, for tokens that of each place ("constant"), which knows
    nothing of the clip: features that share a large mean are similar to each other whatever they say.
    "centred" are the mean cosines once that mean is taken away from both sides; there a constant scores
    nothing. Where the adapter reads tokens of the target, "context" are those as they are.

    Args:
        adapter: in eval mode. Of a token-alignment adapter probabilities of tokens are compared.
        pairs: with held-out samples.

    Returns:
        Kind, parameters, counts, rules; ``before``, ``constant``, ``after`` (and ``context``) with mean, std,
        min, max, percentiles and the share accepted at each of ``THRESHOLDS``; ``centred``; ``published``
        and, row by row of features, whether the adapter does at least as well; ``tokens`` where pairs hold
        the target's head, see :mod:`specfuse.train.adapter_tokens`. A compression drafter has ``tokens``
        alone.

    Raises:
        ValueError: pairs that the adapter cannot read.
    """
    kind, samples = kind_of(adapter), pairs.part("held_out")
    about = {
        "kind": kind,
        "parameters": adapter.num_parameters(),
        "features": pairs.features,
        "pairs": pairs.about,
        "samples": len(samples),
        "clips": len(pairs.clips[samples].unique()),
    }
    if kind == "compression":
        return about | {"tokens": block_report(adapter, pairs, samples)}
    constant = _mean(lambda part: _compared(adapter, target_of(adapter, pairs, part)), pairs.part("train"))
    scores: dict[str, list[Tensor]] = defaultdict(list)
    tokens = (
        TokenScores(adapter, pairs) if kind == "token-alignment" or pairs.target_head is not None else None
    )
    for part in samples.split(128):
        t, y = target_of(adapter, pairs, part), run_adapter(adapter, pairs, part).detach()
        if tokens is not None:
            tokens.add(part, y, t)
        t, y = _compared(adapter, t), _compared(adapter, y)
        x = _before(adapter, pairs, part, t)
        scores["before"].append(_cosine(x, t))
        if pairs.context is not None and pairs.context.shape[1:] == t.shape[1:]:
            scores["context"].append(_cosine(pairs.context[part].to(t.device), t))
        scores["constant"].append(_cosine(constant.expand_as(t), t))
        scores["after"].append(_score(adapter, pairs, part, y, t))
        scores["b_centred"].append(_cosine(x - constant, t - constant))
        scores["centred"].append(_cosine(y - constant, t - constant))
    joined = {name: torch.cat(values) for name, values in scores.items()}
    centred = {name: rounded(joined.pop(key).mean()) for name, key in CENTRED.items()}
    rows = {name: describe(values) for name, values in joined.items()}
    reached = {} if kind == "token-alignment" else at_least(rows["after"])
    report = about | {"vectors": len(joined["after"]), "before_rule": before_rule(adapter, pairs)}
    report |= {**rows, "centred": centred, "published": PUBLISHED, "at_least": reached}
    if tokens is not None:
        report["tokens"] = tokens.figures(samples, joined["after"], THRESHOLDS)
    return report


def describe(scores: Tensor) -> dict[str, Any]:
    """Mean, spread, percentiles and shares at or above each threshold, of ``[M]`` similarities."""
    quantiles = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    # torch.quantile takes 16 million at most; a million evenly spaced ones say the same.
    values = torch.quantile(scores[:: -(-len(scores) // 1_000_000)].double(), quantiles.to(scores.device))
    return {
        "mean": rounded(scores.mean()),
        "std": rounded(scores.std(correction=0)),
        "min": rounded(scores.min()),
        "max": rounded(scores.max()),
        "percentiles": {p: rounded(v) for p, v in zip(PERCENTILES, values, strict=True)},
        "accepted": {t: rounded((scores >= t).double().mean()) for t in THRESHOLDS},
    }


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """The few figures of a report that one looks at first."""
    told = {name: figures[name] for name in ("kind", "parameters", "features", "samples", "clips")}
    if "training" in figures:
        training = figures["training"]
        early = ", ended early" if training["stopped_early"] else ""
        told["training"] = f"{training['steps']} steps in {training['seconds']} s, best at " + (
            f"{training['best_step']}{early}"
            if training["best_step"]
            else f"its start{early}: nothing learned"
        )
    if "after" in figures:
        told["mean cosine"] = {name: figures[name]["mean"] for name in ROWS if name in figures}
        told["mean centred"] = figures["centred"]
        told["at least 0.8"] = figures["after"]["accepted"][0.8]
    if figures.get("at_least"):
        told["rows reached"] = f"{sum(figures['at_least'].values())} of {len(figures['at_least'])}"
    names = {"match": "same token", "accepted": "draws accepted"}
    tokens = figures.get("tokens", {})
    told |= {title: tokens[name] for name, title in names.items() if name in tokens}
    if "right_by_depth" in tokens:
        told["right next token"] = {when: values[0] for when, values in tokens["right_by_depth"].items()}
    for name in ("chain", "block"):
        if name in tokens:
            told["tokens per pass"] = {when: v["tokens_per_pass"] for when, v in tokens[name].items()}
    return told


def at_least(after: dict[str, Any]) -> dict[str, bool]:
    """Row by row whether ``after`` reaches the published row, to the digits that were published."""
    published = PUBLISHED["after"]
    rows = {"mean": after["mean"] >= published["mean"]}
    for name in ("percentiles", "accepted"):
        digits = 3 if name == "accepted" else 4
        for key, value in published[name].items():
            rows[f"p{key}" if name == "percentiles" else f">= {key}"] = (
                round(after[name][key], digits) >= value
            )
    return rows


def before_rule(adapter: AdapterModel, pairs: Pairs) -> str:
    """What "before" means for these pairs, as a sentence."""
    if kind_of(adapter) == "token-alignment":
        return "the drafter's own probabilities of tokens"
    source, target = pairs.source.shape, pairs.target.shape
    rule = "the drafter's features as they are"
    if source[-1] > target[-1]:
        rule = f"the first {target[-1]} of the drafter's {source[-1]} features"
    elif source[-1] < target[-1]:
        rule = f"the drafter's {source[-1]} features, followed by {target[-1] - source[-1]} zeros"
    repeated = len(source) == 3 and source[1] != target[1]
    return f"{rule}, each token {target[1] // source[1]} times" if repeated else rule


def _before(adapter: AdapterModel, pairs: Pairs, samples: Tensor, target: Tensor) -> Tensor:
    source = pairs.sources(samples).to(target.device)
    if kind_of(adapter) == "token-alignment":
        return logits_of(source, pairs.source_head).softmax(-1)
    if source.dim() == 3 and source.shape[1] != target.shape[1]:
        source = source.repeat_interleave(target.shape[1] // source.shape[1], 1)
    return fit_width(source, target.shape[-1])


def _score(adapter: AdapterModel, pairs: Pairs, samples: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Cosines of adapted features, by the fused op where it knows the adapter."""
    if kind_of(adapter) not in FUSED:
        return _cosine(y, t)
    source = pairs.sources(samples).to(t.device)
    if kind_of(adapter) != "linear":
        source = fit_width(source, t.shape[-1])
    with torch.no_grad():
        flat = source.flatten(0, -2), t.flatten(0, -2)
        return adapter_cosine(flat[0], adapter, flat[1], THRESHOLDS[0]).score  # type: ignore[arg-type]


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return F.cosine_similarity(x.float(), y.float(), dim=-1).flatten()


def _compared(adapter: AdapterModel, values: Tensor) -> Tensor:
    # Log-probabilities would all be alike: nearly every token is nearly impossible.
    return values.softmax(-1) if kind_of(adapter) == "token-alignment" else values


def _mean(values: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    total, count = torch.zeros(()), 0
    for part in samples.split(256):
        found = values(part)
        total, count = total.to(found.device) + found.sum(0), count + len(found)
    return total / count
