"""How close an adapter brings a drafter to its target on held-out clips: ``specfuse align report``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specfuse.adapters import AdapterModel, kind_of
from specfuse.ops.adapter_cosine import adapter_cosine
from specfuse.train.adapter_losses import logits_of, run_adapter, target_of
from specfuse.train.adapter_pairs import Pairs, fit_width

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
PERCENTILES = (10, 25, 50, 75, 90, 95, 99)
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
    ("after"), and of one vector that knows nothing of the clip, the mean target of training ("constant"):
    features that share a large mean are similar to each other whatever they say. "centred" are the mean
    cosines once that vector is taken away from both sides; there a constant scores nothing.

    Args:
        adapter: in eval mode. Of a token-alignment adapter logits are compared, as log-probabilities.
        pairs: with held-out samples.

    Returns:
        Kind, counts, rules; ``before``, ``constant`` and ``after`` with mean, std, min, max, percentiles and
        the share accepted at each of ``THRESHOLDS``; ``centred``; ``published`` and, row by row, whether the
        adapter does at least as well; ``tokens`` where pairs hold the target's head. A compression drafter
        has ``tokens`` alone.

    Raises:
        ValueError: pairs that the adapter cannot read.
    """
    kind, samples = kind_of(adapter), pairs.part("held_out")
    about = {
        "kind": kind,
        "features": pairs.features,
        "pairs": pairs.about,
        "samples": len(samples),
        "clips": len(pairs.clips[samples].unique()),
    }
    if kind == "compression":
        return about | {"tokens": {"right_by_depth": _right_by_depth(adapter, pairs, samples)}}
    constant = _mean(lambda part: _normal(adapter, target_of(adapter, pairs, part)), pairs.part("train"))
    scores: dict[str, list[Tensor]] = {n: [] for n in ("before", "constant", "after", "b_centred", "centred")}
    matches: list[Tensor] = []
    for part in samples.split(128):
        t, y = target_of(adapter, pairs, part), run_adapter(adapter, pairs, part).detach()
        if kind == "token-alignment" or pairs.target_head is not None:
            head = None if kind == "token-alignment" else pairs.target_head
            matches.append((logits_of(y, head).argmax(-1) == logits_of(t, head).argmax(-1)).flatten())
        t, y = _normal(adapter, t), _normal(adapter, y)
        x = _before(adapter, pairs, part, t)
        scores["before"].append(_cosine(x, t))
        scores["constant"].append(_cosine(constant.expand_as(t), t))
        scores["after"].append(_score(adapter, pairs, part, y, t))
        scores["b_centred"].append(_cosine(x - constant, t - constant))
        scores["centred"].append(_cosine(y - constant, t - constant))
    joined = {name: torch.cat(values) for name, values in scores.items()}
    rows = {name: describe(joined[name]) for name in ("before", "constant", "after")}
    centred = {"before": _rounded(joined["b_centred"].mean()), "after": _rounded(joined["centred"].mean())}
    report = about | {"vectors": len(joined["after"]), "before_rule": before_rule(adapter, pairs)}
    report |= {**rows, "centred": centred, "published": PUBLISHED, "at_least": at_least(rows["after"])}
    if matches:
        report["tokens"] = _agreement(joined["after"], torch.cat(matches))
    return report


def describe(scores: Tensor) -> dict[str, Any]:
    """Mean, spread, percentiles and shares at or above each threshold, of ``[M]`` similarities."""
    quantiles = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    # torch.quantile takes 16 million at most; a million evenly spaced ones say the same.
    values = torch.quantile(scores[:: -(-len(scores) // 1_000_000)].double(), quantiles.to(scores.device))
    return {
        "mean": _rounded(scores.mean()),
        "std": _rounded(scores.std(correction=0)),
        "min": _rounded(scores.min()),
        "max": _rounded(scores.max()),
        "percentiles": {p: _rounded(v) for p, v in zip(PERCENTILES, values, strict=True)},
        "accepted": {t: _rounded((scores >= t).double().mean()) for t in THRESHOLDS},
    }


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """The few figures of a report that one looks at first."""
    told = {name: figures[name] for name in ("kind", "features", "samples", "clips")}
    if "after" in figures:
        told["mean cosine"] = {name: figures[name]["mean"] for name in ("before", "constant", "after")}
        told["mean centred"] = figures["centred"]
        told["at least 0.8"] = figures["after"]["accepted"][0.8]
        told["rows reached"] = f"{sum(figures['at_least'].values())} of {len(figures['at_least'])}"
    if "match" in figures.get("tokens", {}):
        told["same token"] = figures["tokens"]["match"]
    if "right_by_depth" in figures.get("tokens", {}):
        told["right next token"] = figures["tokens"]["right_by_depth"][0]
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
        return "the drafter's own log-probabilities"
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
        return logits_of(source, pairs.source_head).log_softmax(-1)
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


def _normal(adapter: AdapterModel, values: Tensor) -> Tensor:
    return values.log_softmax(-1) if kind_of(adapter) == "token-alignment" else values


def _mean(values: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    total, count = torch.zeros(()), 0
    for part in samples.split(256):
        flat = values(part).flatten(0, -2)
        total, count = total.to(flat.device) + flat.sum(0), count + len(flat)
    return total / count


def _agreement(scores: Tensor, match: Tensor) -> dict[str, Any]:
    """How often the most likely tokens agree, in all and among samples at or above each threshold."""
    by_threshold = {
        t: {"share": _rounded(kept.double().mean()), "match": _rounded(match[kept].double().mean())}
        for t in THRESHOLDS
        if (kept := scores >= t).any()
    }
    return {"match": _rounded(match.double().mean()), "match_at": by_threshold}


@torch.no_grad()
def _right_by_depth(adapter: AdapterModel, pairs: Pairs, samples: Tensor) -> list[float]:
    right = [
        run_adapter(adapter, pairs, part).argmax(-1) == target_of(adapter, pairs, part)
        for part in samples.split(128)
    ]
    return [_rounded(value) for value in torch.cat(right).double().mean(0)]


def _rounded(value: Tensor) -> float:
    return round(float(value), 4)
