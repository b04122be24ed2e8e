"""``specfuse generate --compare``: the same question through ``model.generate``, token by token and timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def compare_with_plain(
    speculate: Callable[[Any], Any],
    plain: Callable[[], Any],
    make_drafter: Callable[[], Any],
    *,
    sampled: bool,
    repeats: int,
    progress: bool,
) -> dict[str, Any]:
    """Times first ask, ``model.generate`` and repeated ask, interleaved; compares their tokens.

    Every round starts with a fresh drafter, so that "first" never profits from an earlier round. "again" is
    the same question to the drafter that has just answered it: the best case of one that remembers.

    Args:
        speculate: answers with the drafter it is given (None: plain decoding through specfuse's loop).
        plain: answers with ``model.generate``.
        make_drafter: makes the drafter as it is before the first question.
        sampled: the answers are drawn; the tokens are then compared with specfuse's plain decoding of
            the same seed, since ``model.generate`` draws its noise in another way.
        repeats: timed rounds; one more comes first and is not timed.
        progress: show a progress bar on stderr.

    Returns:
        Medians ``first_seconds``, ``plain_seconds``, ``again_seconds``; ``first_ratio``, ``again_ratio``
        (plain over it); ``tokens_equal``; ``compared_with``; ``repeats``.
    """
    from rich.console import Console
    from rich.progress import track

    seconds: dict[str, list[float]] = {"first": [], "plain": [], "again": []}
    equal = True
    console = Console(stderr=True)
    for index in track(
        range(repeats + 1), "comparing", console=console, transient=True, disable=not progress
    ):
        drafter = make_drafter()
        calls = {"first": (speculate, drafter), "plain": (plain,), "again": (speculate, drafter)}
        answers = {}
        for way, (call, *arguments) in calls.items():
            start = time.perf_counter()
            # Reading the tokens waits for the device.
            answers[way] = call(*arguments).sequences.tolist()
            elapsed = time.perf_counter() - start
            if index:  # round 0 warms up caches and allocators
                seconds[way].append(elapsed)
        expected = speculate(None).sequences.tolist() if sampled else answers["plain"]
        equal = equal and answers["first"] == answers["again"] == expected
    medians = {f"{way}_seconds": statistics.median(times) for way, times in seconds.items()}
    return {
        **medians,
        "first_ratio": medians["plain_seconds"] / medians["first_seconds"],
        "again_ratio": medians["plain_seconds"] / medians["again_seconds"],
        "tokens_equal": equal,
        "compared_with": "specfuse without a drafter, same seed" if sampled else "model.generate",
        "repeats": repeats,
    }


def comparison_lines(report: dict[str, Any]) -> list[str]:
    """The comparison as text."""
    result = report["compare"]
    remembers = report["drafter"] in ("auto", "corpus")
    lines = [
        f"model.generate            {result['plain_seconds']:.3f} s",
        f"specfuse                  {result['first_seconds']:.3f} s  {result['first_ratio']:.2f}x",
    ]
    if remembers:
        again = f"{result['again_seconds']:.3f} s  {result['again_ratio']:.2f}x"
        lines.append(f"specfuse, asked again     {again}  (the drafter remembers its answer)")
    verdict = "the same as" if result["tokens_equal"] else "NOT THE SAME AS"
    lines.append(f"tokens: {verdict} those of {result['compared_with']}")
    lines.append(
        f"timed: the whole call on {report['prompt_tokens']} prompt tokens with video encoding and prefill, "
        f"without reading the file; median of {result['repeats']} interleaved rounds"
    )
    return lines
