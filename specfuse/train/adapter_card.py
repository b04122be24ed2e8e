"""What goes beside an adapter's weights, and the report as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specfuse.train.card import _versions

if TYPE_CHECKING:
    from rich.table import Table

CARD = """---
library_name: transformers
license: apache-2.0
---
# {kind} adapter, trained by specfuse

{parameters:,} parameters between a drafter's features and a target's.

- Pairs: {pairs}.
- Command: `{command}`
- Seed {seed}; loss "{loss}"; {steps} steps in {seconds:.0f} seconds{early}; the weights are those of
  step {best_step}, the best on {validation:.4f} by validation clips.
- {versions}.

{results}

    from specfuse.adapters import load_adapter
    adapter = load_adapter("this directory")
"""
NOTE = (
    'Cosine similarity with the target\'s features. "before": {before_rule}.{context} "constant": the mean '
    "target of the training clips, for tokens that of each place, which knows nothing of a clip. With that "
    "mean taken away from both sides the mean cosine is {before:.4f} before and {after:.4f} after."
)
CONTEXT_NOTE = ' "context": tokens of the target that the adapter is given, as they are.'
PUBLISHED_NOTE = (
    "Published: EventGPT and Video-LLaVA (7B), 1,042 held-out DSEC samples of 150,528 raw pixels; another "
    "model, another input. A high cosine does not mean the same token: accepting by it is lossy."
)
STYLES = {"before": "C0", "context": "C1", "constant": "C7", "after": "C2"}


def write_adapter_card(directory: Path, figures: dict[str, Any], command: str) -> None:
    """Writes ``README.md`` with the figures of ``align_report`` and of the training."""
    training = figures["training"]
    parts = [f"## On {figures['samples']:,} held-out samples of {figures['clips']:,} clips"]
    if "after" in figures:
        parts += [markdown(figures), note(figures)]
    if figures.get("at_least"):
        parts.append(PUBLISHED_NOTE)
    if "tokens" in figures:
        parts.append(token_lines(figures["tokens"]))
    early = ", ended early" if training["stopped_early"] else ""
    if not training["best_step"]:
        early += ", none of them better than the start"
    card = CARD.format(
        kind=figures["kind"].capitalize(),
        pairs=figures["pairs"],
        parameters=figures["parameters"],
        command=command,
        early=early,
        versions=_versions(),
        results="\n\n".join(parts),
        **{name: training[name] for name in ("seed", "loss", "steps", "seconds", "best_step", "validation")},
    )
    (directory / "README.md").write_text(card)


def rows_of(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of a report: name, a column for each of ``header``, reached."""
    parts, reached = [figures[name] for name in STYLES if name in figures], figures["at_least"]
    if reached:
        parts += [figures["published"][name] for name in ("before", "after")]

    def row(name: str, values: list[Any], mark: str, form: str) -> tuple[str, ...]:
        told = {None: "", True: "yes", False: "NO"}[reached.get(mark)]
        cells = ("" if value is None else format(value, form) for value in values)
        return (name, *cells, told) if reached else (name, *cells)

    table = [row(name, [p.get(name) for p in parts], name, ".4f") for name in ("mean", "std", "min", "max")]
    for title, group, mark, form in (
        ("p{}", "percentiles", "p{}", ".4f"),
        ("cos >= {}", "accepted", ">= {}", ".1%"),
    ):
        for key in figures["after"][group]:
            values = [p.get(group, {}).get(key) for p in parts]
            table.append(row(title.format(key), values, mark.format(key), form))
    return table


def header(figures: dict[str, Any]) -> tuple[str, ...]:
    """Of the columns: what the report compares and, where it says what is reached, what was published."""
    published = ("published before", "published after", "reached") if figures["at_least"] else ()
    return "", *(name for name in STYLES if name in figures), *published


def markdown(figures: dict[str, Any]) -> str:
    """The table in Markdown."""
    names = header(figures)
    lines = [names, tuple("---" for _ in names), *rows_of(figures)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rich_table(figures: dict[str, Any]) -> Table:
    """The table for a terminal."""
    from rich.table import Table

    title = f"{figures['kind']}, {figures['features']}: {figures['samples']:,} held-out samples"
    table = Table(title=title)
    for name in header(figures):
        # One line for each row, in 80 columns too.
        table.add_column(name.replace(" ", "\n"), justify="right" if name else "left", no_wrap=True)
    for row in rows_of(figures):
        table.add_row(*row)
    return table


def note(figures: dict[str, Any]) -> str:
    """What "before" and "constant" mean, and the centred means."""
    context = CONTEXT_NOTE if "context" in figures else ""
    return NOTE.format(before_rule=figures["before_rule"], context=context, **figures["centred"])


def token_lines(tokens: dict[str, Any]) -> str:
    """Figures of tokens, one a line, as ``specfuse align report`` prints them."""
    return "\n".join(f"- {name}: {value}" for name, value in tokens.items())


def write_adapter_curves(directory: Path, losses: list[float], scores: list[float], every: int) -> bool:
    """Writes ``loss.png``: the loss, and validation beside it; False where matplotlib is not installed."""
    if (pyplot := _pyplot()) is None:
        return False
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
    left.plot(losses, linewidth=0.8)
    left.set(title="training", xlabel="step", ylabel="loss", yscale="log")
    right.plot(np.minimum(np.arange(len(scores)) * every, len(losses)), scores, marker=".")
    right.set(title="validation clips", xlabel="step", ylabel="score")
    figure.tight_layout()
    figure.savefig(directory / "loss.png", dpi=110)
    pyplot.close(figure)
    return True


def write_report_picture(path: Path, figures: dict[str, Any]) -> None:
    """Accepted share by threshold, and percentiles, beside the published ones.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if (pyplot := _pyplot()) is None:
        raise ValueError("png needs matplotlib: pip install matplotlib")
    published = figures["published"]
    lines = [(name, figures[name], style) for name, style in STYLES.items() if name in figures]
    if figures["at_least"]:
        lines += [(f"published {name}", published[name], STYLES[name] + "--") for name in ("before", "after")]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    for name, values, style in lines:
        for axis, group in ((left, "accepted"), (right, "percentiles")):
            if points := values.get(group):
                axis.plot(
                    [float(key) for key in points], list(points.values()), style, marker=".", label=name
                )
    left.set(xlabel="cosine threshold", ylabel="share at or above it", ylim=(-0.02, 1.02))
    right.set(xlabel="percentile", ylabel="cosine similarity")
    left.legend(fontsize=8)
    figure.suptitle(f"{figures['kind']} adapter, {figures['samples']:,} held-out samples")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
