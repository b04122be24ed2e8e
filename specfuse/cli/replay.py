"""``specfuse replay``: recorded answers through a drafter and the real verification op."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from specfuse.cli import UserError, print_json

if TYPE_CHECKING:
    from specfuse.replay import ReplayResult

DRAFTERS = ("corpus", "lookup", "combined", "none")
ORDERS = ("file", "shuffled")


def replay(
    file: str = typer.Argument("example", help="Recording (JSON); 'example' is the synthetic one shipped."),
    drafter: str = typer.Option("corpus", help=f"One of {', '.join(DRAFTERS)}."),
    nodes: int = typer.Option(16, help="Drafted nodes that one pass may verify.", min=0, max=1023),
    order: str = typer.Option("file", help="file, or shuffled."),
    seed: int = typer.Option(0, help="Seed of the shuffled order."),
    evidence: bool = typer.Option(
        False, "--evidence", help="Give the drafter the recorded 'draft' of the same clip as a hint."
    ),
    json: bool = typer.Option(False, "--json", help="Print JSON, alone on stdout."),
) -> int:
    """Run recorded answers through a drafter and the real verification op; needs no model.

    A recording is a JSON object with a list "samples"; each has "target" (token ids) and may have "draft",
    "id" and "question". Every answer is learned only after it is finished.
    """
    if drafter not in DRAFTERS:
        raise UserError(f"--drafter must be one of {', '.join(DRAFTERS)}, got {drafter!r}")
    if order not in ORDERS:
        raise UserError(f"--order must be one of {', '.join(ORDERS)}, got {order!r}")
    from specfuse import replay as engine
    from specfuse.data.recording import load_recording

    recording = load_recording(file)
    if evidence and all(sample.draft is None for sample in recording.samples):
        raise UserError(f"{file}: --evidence needs samples with a draft")
    if order == "shuffled":
        recording = recording._replace(samples=engine.shuffled(recording.samples, seed))
    proposer = engine.make_drafter(drafter)
    with _progress(len(recording.samples)) as advance:
        result = engine.replay(recording, proposer, nodes, evidence=evidence, progress=advance)
    settings = {"drafter": drafter, "nodes": nodes, "order": order, "evidence": evidence}
    if order == "shuffled":
        settings["seed"] = seed
    summary = {"file": file, "description": recording.description, **settings, **_figures(result)}
    if json:
        print_json(summary)
    else:
        print("\n".join(_lines(summary)))
    return 0


def _figures(result: ReplayResult) -> dict[str, Any]:
    times = sorted(result.propose_us)
    return {
        "answers": result.answers,
        "tokens": result.tokens,
        "passes": result.passes,
        "tokens_per_pass": result.tokens_per_pass,
        "drafted_per_pass": result.drafted / result.passes,
        "propose_us_p50": statistics.median(times),
        "propose_us_p90": times[len(times) * 9 // 10],
        # A drafter that does not learn has no rate.
        "learn_tokens_per_s": result.tokens / result.learn_s if result.learn_s > 0 else None,
        "histogram": {str(emitted): passes for emitted, passes in result.histogram.items()},
    }


def _lines(summary: dict[str, Any]) -> list[str]:
    rate = summary["learn_tokens_per_s"]
    order = summary["order"] + (f", seed {summary['seed']}" if "seed" in summary else "")
    lines = [
        f"{summary['file']}: {summary['answers']:,} answers, {summary['tokens']:,} tokens (replayed)",
        *([summary["description"]] if summary["description"] else []),
        "",
        f"  drafter           {summary['drafter']}, {summary['nodes']} nodes, order: {order}"
        + (", with the other model's answer as evidence" if summary["evidence"] else ""),
        f"  tokens per pass   {summary['tokens_per_pass']:.3f}   ({summary['passes']:,} passes)",
        f"  drafting          {summary['propose_us_p50']:.0f} us per step (median), "
        f"{summary['propose_us_p90']:.0f} us (p90)",
        f"  learning          {f'{rate:,.0f} tokens/s' if rate else 'does not learn'}",
        "",
        "  tokens emitted by a pass",
    ]
    most = max(summary["histogram"].values())
    for emitted, passes in summary["histogram"].items():
        bar = "#" * max(1, round(40 * passes / most))
        lines.append(f"  {emitted:>5}  {passes:>7,}  {bar}")
    return lines


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr that shows up only where the work takes longer than a moment."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("replaying", total=total)
    begin, done, shown = time.monotonic(), 0, False

    def advance() -> None:
        nonlocal done, shown
        done += 1
        if not shown and time.monotonic() - begin > 1.0:
            bar.start()
            shown = True
        if shown:
            bar.update(task, completed=done)

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
