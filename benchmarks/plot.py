"""Draws what the micro-benchmarks measured, from their CSV files, as PNG and SVG.

    python benchmarks/plot.py benchmarks/results/*.csv                   # share of the floor, GPU rows
    python benchmarks/plot.py FILES --kind speedup --device cpu          # times faster than eager

One panel per op, one bar per case and provider; the last row of each counts. Hardware and commit stand in the
title. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Values = dict[str, dict[str, dict[str, float]]]  # op -> case -> provider -> value
AXES = {
    "share": "share of the floor (1 = as fast as bytes and operations allow)",
    "speedup": "times faster than eager PyTorch",
}


def read(paths: Iterable[Path], device: str, kind: str) -> tuple[Values, str]:
    """Values of every op measured on ``device`` ("gpu" or "cpu"), and the label of the newest row.

    Raises:
        ValueError: no such row in these files, or a file is of another kind.
    """
    values: Values = defaultdict(lambda: defaultdict(dict))
    label, newest = "", ""
    column = {"share": "share", "speedup": "p50_us"}[kind]
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if "share" not in row:
                    raise ValueError(f"{path} is not the CSV of a micro-benchmark: it has no column 'share'")
                if (row["gpu"] != "none") != (device == "gpu") or not row[column]:
                    continue
                values[row["op"]][row["case"]][row["provider"]] = float(row[column])
                if row["date"] >= newest:
                    hardware = row["gpu"] if device == "gpu" else row["cpu"]
                    newest = row["date"]
                    label = f"{hardware}, torch {row['torch']}, commit {row['commit']}, {row['date'][:10]}"
    if not values:
        raise ValueError(f"no {kind} measured on a {device} in these files")
    if kind == "speedup":
        for cases in values.values():
            for case, found in cases.items():
                cases[case] = {name: found["eager"] / us for name, us in found.items() if name != "eager"}
    return {op: dict(cases) for op, cases in values.items()}, label


def draw(values: Values, label: str, kind: str) -> Any:
    """One matplotlib figure with a panel per op."""
    from matplotlib.figure import Figure

    height = sum(1.2 + 0.28 * sum(len(p) for p in cases.values()) for cases in values.values())
    figure = Figure(figsize=(9, height), layout="constrained")
    panels = figure.subplots(len(values), 1, squeeze=False)[:, 0]
    names = sorted({provider for cases in values.values() for found in cases.values() for provider in found})
    colours = {name: f"C{i}" for i, name in enumerate(sorted(names, key=lambda n: n != "specfuse"))}
    for panel, (op, cases) in zip(panels, values.items(), strict=True):
        bars = [(case, name, value) for case, found in cases.items() for name, value in found.items()]
        panel.barh(range(len(bars)), [value for *_, value in bars], color=[colours[n] for _, n, _ in bars])
        panel.set_yticks(range(len(bars)), [f"{case}  {name}" for case, name, _ in bars], fontsize=7)
        panel.invert_yaxis()
        panel.set_xlim(0, max(1.0, *(value for *_, value in bars)))
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_title(op, loc="left", fontsize=9)
        panel.set_xlabel(AXES[kind], fontsize=7)
    figure.suptitle(label, fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="CSV files written by bench_<op>.py --csv")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--kind", choices=AXES, default="share")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    try:
        values, label = read(args.files, args.device, args.kind)
    except (OSError, ValueError) as error:
        raise SystemExit(f"plot: {error}") from None
    figure = draw(values, label, args.kind)
    args.out.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        target = args.out / f"{args.kind}_{args.device}.{suffix}"
        figure.savefig(target, dpi=150)
        print(target)


if __name__ == "__main__":
    main()
