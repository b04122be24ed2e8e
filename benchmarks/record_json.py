"""Appends a benchmark's JSON to a CSV file: one row per figure, with machine and versions in every row.

    python benchmarks/bench_vision_cache.py --json > run.json
    python benchmarks/record_json.py bench_vision_cache run.json benchmarks/results/end_to_end.csv

Nested objects become dotted metric names. In a list of objects each is a case, named by the text in it.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environment import COLUMNS, environment

ROW = (*COLUMNS, "benchmark", "case", "metric", "value")

# Text under these names says where a benchmark ran, which has columns of its own; other text names the case.
PLACE = {"hardware", "gpu", "device_name", "torch", "triton", "transformers", "python", "date", "commit"}


def figures(value: Any, case: str = "", metric: str = "") -> Iterator[tuple[str, str, float]]:
    """Yields (case, metric, number) for every number in a JSON value."""
    if isinstance(value, dict):
        names = [text for key, text in value.items() if isinstance(text, str) and key not in PLACE]
        inner = " ".join(filter(None, [case, *names]))
        for key, item in value.items():
            yield from figures(item, inner, f"{metric}.{key}" if metric else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            numbered = metric if isinstance(item, dict) else f"{metric}.{index}"
            yield from figures(item, case, numbered)
    elif isinstance(value, (int, float)):
        yield case, metric, float(value)


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    benchmark, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    rows = list(figures(json.loads(source.read_text())))
    if not rows:
        sys.exit(f"{source} holds no figures")
    fixed = {**environment(), "benchmark": benchmark}
    new = not target.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", newline="") as file:
        writer = csv.DictWriter(file, ROW)
        if new:
            writer.writeheader()
        for case, metric, value in rows:
            writer.writerow({**fixed, "case": case, "metric": metric, "value": f"{value:.6g}"})
    print(f"{target}: {len(rows)} rows added")


if __name__ == "__main__":
    main()
