"""Finds the fastest configuration of an op for this GPU and writes kernels/configs/<op>.<gpu>.json.

    python benchmarks/tune.py tree_attention [--seconds 60] [--out FOLDER]

Sizes and candidates are those of ``tunings()`` in benchmarks/bench_<op>.py. A candidate that is wrong,
or that does not fit the device, is left out and named. When the time is up, what was measured is
written and sizes not reached keep their earlier entry.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment
from timing import interleaved_us

from specfuse.kernels import tuned


def tune(op: str, tunings: Any, device: str, seconds: float, rounds: int = 15) -> list[dict[str, Any]]:
    """One entry per size: the configuration with the smallest median, and the time of the one used today."""
    end = time.monotonic() + seconds
    entries = []
    for tuning in tunings(device):
        if time.monotonic() > end:
            print(f"time is up before {tuning.sizes}", file=sys.stderr)
            break
        today = tuned.config(op, tuning.sizes)
        configs = [today, *(c for c in tuning.configs if c != today)]
        times = {}
        for index, config in enumerate(configs):
            if time.monotonic() > end and times:
                break
            with tuned.override(op, config):
                try:
                    tuning.check()
                    times[index] = interleaved_us({"op": tuning.call}, device, rounds)["op"]["p50_us"]
                except Exception as error:  # a candidate may not fit this device; the others may
                    print(f"{op} {tuning.sizes} {config}: {type(error).__name__}: {error}", file=sys.stderr)
        if not times:
            continue
        best = min(times, key=times.__getitem__)
        entries.append({"sizes": tuning.sizes, "config": configs[best], "us": times[best],
                        "us_before": times.get(0)})  # fmt: skip
        print(f"{op} {tuning.sizes}: {times.get(0)} us -> {times[best]} us with {configs[best]}")
    return entries


def write(op: str, gpu: str, entries: list[dict[str, Any]], folder: Path) -> Path:
    """Writes the GPU's file; entries of sizes that were not measured now are kept from before."""
    path = folder / f"{op}.{gpu}.json"
    measured = [entry["sizes"] for entry in entries]
    kept = json.loads(path.read_text())["entries"] if path.exists() else []
    table = {
        "op": op,
        "gpu": gpu,
        "measured": True,
        **{key: value for key, value in environment().items() if key not in ("gpu", "cpu")},
        "entries": entries + [entry for entry in kept if entry["sizes"] not in measured],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("op")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=tuned.CONFIGS)
    args = parser.parse_args()
    gpu = tuned.gpu_name()
    if gpu is None:
        raise SystemExit("tune: no CUDA device here; configurations are tuned on the GPU they are for")
    tunings = getattr(importlib.import_module(f"bench_{args.op}"), "tunings", None)
    if tunings is None:
        raise SystemExit(f"tune: bench_{args.op} has nothing to tune")
    torch.manual_seed(0)
    entries = tune(args.op, tunings, "cuda", args.seconds)
    if not entries:
        raise SystemExit(f"tune: nothing of {args.op} could be measured")
    print(write(args.op, gpu, entries, args.out))


if __name__ == "__main__":
    main()
