"""Appends a benchmark's JSON to a CSV file: one row per figure, with machine and versions in every row.

    python benchmarks/bench_verify_tree.py --json > run.json
    python benchmarks/record_json.py bench_verify_tree run.json benchmarks/results/gpu_suite.csv

Nested objects become dotted metric names. In a list of objects each is a case, named by the text in it.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

COLUMNS = (
    *("date", "commit", "gpu", "driver", "cuda", "torch", "triton", "transformers"),
    *("benchmark", "case", "metric", "value"),
)


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


def environment() -> dict[str, str]:
    """Versions and hardware of this machine."""
    import torch

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return ""

    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": output("git", "describe", "--always", "--dirty"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": driver,
        "cuda": torch.version.cuda or "",
        **{name: version(name) for name in ("torch", "triton", "transformers")},
    }


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
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for case, metric, value in rows:
            writer.writerow({**fixed, "case": case, "metric": metric, "value": f"{value:.6g}"})
    print(f"{target}: {len(rows)} rows added")


if __name__ == "__main__":
    main()
