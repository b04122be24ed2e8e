"""Draws what the end-to-end benchmarks measured: latencies, speed-up against acceptance, cost of a pass.

    python benchmarks/plot_end_to_end.py [DIR] [--device cpu|gpu] [--out DIR]

Reads generate.csv, acceptance_curve.csv and pass_times.csv where they are in DIR (default benchmarks/results)
and writes latency_DEVICE, acceptance_curve_DEVICE and pass_times_DEVICE as PNG and SVG. The last run of each
input, model and prompt counts; hardware and commit stand in the title. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

Rows = list[dict[str, str]]
Runs = dict[str, Rows]  # a title for the panel -> the rows of its last run
HERE = Path(__file__).resolve().parent


def read(path: Path, device: str) -> Runs:
    """Runs of a file on "cpu" or "gpu", the last of each kind; none where there is no file.

    Raises:
        ValueError: the file is of another kind.
    """
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and "prompt_tokens" not in rows[0]:
        raise ValueError(
            f"{path} is not the CSV of an end-to-end benchmark: it has no column 'prompt_tokens'"
        )
    runs: Runs = {}
    for row in rows:
        if (row["gpu"] != "none") != (device == "gpu"):
            continue
        kind = row["input"] if row["input"] == "miniature" else f"{row['input']}, {row['model']}"
        title = f"{kind}, prompt of {int(row['prompt_tokens']):,} tokens, {row['dtype']}, {row['clock']} time"
        there = runs.get(title)
        if there is None or there[0]["date"] != row["date"]:
            runs[title] = []
        runs[title].append(row)
    return runs


def label(runs: Runs, device: str) -> str:
    """Hardware, versions and commit of the newest run."""
    row = max((rows[0] for rows in runs.values()), key=lambda row: row["date"])
    hardware = row["gpu"] if device == "gpu" else f"{row['cpu']}, {row['threads']} thread(s)"
    return f"{hardware}, torch {row['torch']}, commit {row['commit']}, {row['date'][:10]}"


def latency(runs: Runs) -> Any:
    """One panel per run: a bar per system to its median, whiskers from p20 to p80."""
    from matplotlib.figure import Figure

    heights = [1.2 + 0.26 * len(rows) for rows in runs.values()]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(runs), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, (title, rows) in zip(panels, runs.items(), strict=True):
        p20, p50, p80 = ([float(row[f"p{n}_ms"]) for row in rows] for n in (20, 50, 80))
        spread = [[m - low for m, low in zip(p50, p20, strict=True)]]
        spread.append([high - m for m, high in zip(p50, p80, strict=True)])
        colours = ["C0" if row["system"].startswith("specfuse") else "C7" for row in rows]
        panel.barh(range(len(rows)), p50, xerr=spread, color=colours, error_kw={"linewidth": 0.8})
        panel.set_yticks(range(len(rows)), [row["system"] for row in rows], fontsize=7)
        panel.invert_yaxis()
        panel.set_title(title, loc="left", fontsize=9)
        panel.set_xlabel("milliseconds per question, median and p20 to p80", fontsize=7)
    return figure


def acceptance(runs: Runs) -> Any:
    """Decoding over model.generate by simulated acceptance: a line per number of drafts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for panel, (title, rows) in zip(panels, runs.items(), strict=True):
        for colour, drafts in enumerate(sorted({int(row["drafts"]) for row in rows})):
            chosen = sorted(
                (row for row in rows if int(row["drafts"]) == drafts), key=lambda r: float(r["acceptance"])
            )
            for column, style, name in (
                ("over_generate", "o-", "specfuse"),
                ("assisted_over_generate", "x:", "HF assisted"),
            ):
                points = [(float(row["acceptance"]), float(row[column])) for row in chosen if row[column]]
                if points:
                    panel.plot(
                        *zip(*points, strict=True),
                        style,
                        color=f"C{colour}",
                        label=f"{name}, {drafts} drafts",
                    )
            for row in chosen:
                if row["published"]:
                    panel.plot(
                        float(row["acceptance"]),
                        float(row["published"]),
                        "*",
                        color=f"C{colour}",
                        markersize=11,
                    )
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set_title(f"{title} (stars: published table)", loc="left", fontsize=9)
        panel.set_xlabel("probability that a draft is right", fontsize=7)
        panel.set_ylabel("decoding, times model.generate", fontsize=7)
        panel.legend(fontsize=7)
    return figure


def pass_times(runs: Runs) -> Any:
    """T(n) / T(1) by nodes, a line per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panel = figure.subplots()
    for title, rows in runs.items():
        panel.plot(
            [1 + int(r["drafted"]) for r in rows], [float(r["ratio"]) for r in rows], "o-", label=title
        )
    panel.set_xlabel("nodes of a pass", fontsize=8)
    panel.set_ylabel("T(n) / T(1)", fontsize=8)
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=7)
    return figure


PLOTS = {"generate": ("latency", latency), "acceptance_curve": ("acceptance_curve", acceptance)}
PLOTS["pass_times"] = ("pass_times", pass_times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=HERE / "results")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="cpu")
    parser.add_argument("--out", type=Path, help="default: where the files are")
    args = parser.parse_args()
    out = args.out or args.results
    written = []
    for name, (target, draw) in PLOTS.items():
        try:
            runs = read(args.results / f"{name}.csv", args.device)
        except (OSError, ValueError) as error:
            raise SystemExit(f"plot_end_to_end: {error}") from None
        if not runs:
            continue
        figure = draw(runs)
        figure.suptitle(label(runs, args.device), fontsize=9)
        out.mkdir(parents=True, exist_ok=True)
        for suffix in ("png", "svg"):
            path = out / f"{target}_{args.device}.{suffix}"
            figure.savefig(path, dpi=150)
            written.append(path)
    if not written:
        raise SystemExit(f"plot_end_to_end: nothing measured on a {args.device} in {args.results}")
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
