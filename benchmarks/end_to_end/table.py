"""What the rounds come to: one row per competitor, as text, Markdown and CSV."""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from environment import COLUMNS, environment

from end_to_end.contest import Timed
from end_to_end.systems import GENERATE, LOOKUP, PLAIN

ABOUT = ("input", "model", "prompt_tokens", "dtype", "threads", "load", "clock", "questions", "rounds")
TIMES = ("p20_ms", "p50_ms", "p80_ms", "first_ms", "second_first_ms", "tokens_per_s", "decode_tokens_per_s")
PARTS = ("prefill", "draft", "verify", "commit", "other")
RATIOS = ("over_generate", "decode_over_generate", "decode_over_lookup", "decode_over_plain")
TOTALS = ("total_over_generate", "total_decode_over_generate", "total_decode_over_lookup")
ROW = (*COLUMNS, *ABOUT, "system", "tokens", "identical", *TIMES, "tokens_per_pass")
ROW += (*(f"{part}_share" for part in PARTS), "peak_mib", *RATIOS, *TOTALS)
PASS_ROW = (*COLUMNS, *ABOUT, "drafted", "p20_ms", "p50_ms", "p80_ms", "ratio")


def rows(found: Mapping[str, Sequence[Timed]], peaks: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row per competitor; ratios are medians over questions of times of the same round.

    Identical tokens are what it took to come here.
    """
    return [
        {
            "system": name,
            **_times(timed),
            **_shares(timed),
            "identical": True,
            "peak_mib": round(peaks[name] / 2**20, 1) if name in peaks else "",
            "over_generate": _ratio(found, GENERATE, name, decode=False),
            "decode_over_generate": _ratio(found, GENERATE, name),
            "decode_over_lookup": _ratio(found, LOOKUP, name),
            "decode_over_plain": _ratio(found, PLAIN, name),
            "total_over_generate": _ratio(found, GENERATE, name, decode=False, total=True),
            "total_decode_over_generate": _ratio(found, GENERATE, name, total=True),
            "total_decode_over_lookup": _ratio(found, LOOKUP, name, total=True),
        }
        for name, timed in found.items()
    ]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50, p80 in milliseconds of seconds."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {name: round(1e3 * tenths[i], 3) for name, i in (("p20_ms", 1), ("p50_ms", 4), ("p80_ms", 7))}


def _times(timed: Sequence[Timed]) -> dict[str, Any]:
    scored = [each for each in timed if each.scored]
    first = [each.first_seconds for each in scored if each.turn == 0]
    second = [each.first_seconds for each in timed if each.turn == 1]
    tokens = sum(each.tokens for each in scored)
    decoding = sum(decode_seconds(each) for each in scored)
    return {
        "tokens": tokens,
        **percentiles([each.seconds for each in scored]),
        "first_ms": round(1e3 * statistics.median(first), 3) if first else "",
        "second_first_ms": round(1e3 * statistics.median(second), 3) if second else "",
        "tokens_per_s": round(tokens / sum(each.seconds for each in scored), 1),
        # A first pass with drafts behind it emits several tokens: they count as decoded.
        "decode_tokens_per_s": round((tokens - len(scored)) / decoding, 1) if decoding > 0 else "",
        "tokens_per_pass": round(tokens / sum(each.passes for each in scored), 3),
    }


def decode_seconds(timed: Timed) -> float:
    """From the first token on."""
    return max(timed.seconds - timed.first_seconds, 0.0)


def _shares(timed: Sequence[Timed]) -> dict[str, Any]:
    scored = [each for each in timed if each.scored and each.shares]
    if not scored:
        return {f"{part}_share": "" for part in PARTS}
    total = sum(each.seconds for each in scored)
    shares = {part: sum(each.shares[part] * each.seconds for each in scored) / total for part in PARTS[:-1]}
    shares["other"] = 1 - sum(shares.values())
    return {f"{part}_share": round(share, 4) for part, share in shares.items()}


def _ratio(
    found: Mapping[str, Sequence[Timed]], theirs: str, ours: str, decode: bool = True, total: bool = False
) -> Any:
    """How many times longer ``theirs`` took: the median over answers, or all together; empty without it."""
    pairs = [
        (decode_seconds(a), decode_seconds(b)) if decode else (a.seconds, b.seconds)
        for a, b in zip(found.get(theirs, ()), found[ours], strict=theirs in found)
        if a.scored and a.tokens > 1
    ]
    if not pairs:
        return ""
    if total:
        return round(sum(a for a, _ in pairs) / sum(b for _, b in pairs), 3)
    return round(statistics.median(a / max(b, 1e-6) for a, b in pairs), 3)


def about(target: Any, **given: Any) -> dict[str, Any]:
    """The columns that all rows of a run share."""
    return {
        **environment(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        **given,
    }


def append(path: Path, columns: Sequence[str], shared: Mapping[str, Any], new: Sequence[Mapping]) -> None:
    """Appends rows to a CSV file, under one header.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    if not fresh:
        with path.open(newline="") as file:
            there = next(csv.reader(file), [])
        if there != list(columns):
            raise ValueError(f"{path} has other columns than this benchmark writes")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerows({**shared, **row} for row in new)


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The columns that a reader looks at first."""
    lines = [
        "| system | per question, ms (p20 / p50 / p80) | first token, ms: 1st / 2nd question "
        "| tokens/s | tokens per pass | whole call over `model.generate` | decoding over it "
        "| over prompt lookup | over plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        times = " / ".join(f"{row[f'{name}_ms']:,.0f}" for name in ("p20", "p50", "p80"))
        first = " / ".join(f"{row[name]:,.1f}" if row[name] != "" else "-" for name in TIMES[3:5])
        ratios = " | ".join(f"{row[name]:.2f}x" if row[name] != "" else "" for name in RATIOS)
        cells = f"{times} | {first} | {row['tokens_per_s']:,.0f} | {row['tokens_per_pass']:.2f}"
        lines.append(f"| {row['system']} | {cells} | {ratios} |")
    return "\n".join(lines)
