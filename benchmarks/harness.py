"""What the micro-benchmarks of the ops share: cases, checks before timing, floors, output, pytest-benchmark.

Each ``bench_<op>.py`` yields Cases and ends in ``main(__doc__, cases)``:

    python benchmarks/bench_<op>.py [--device cuda] [--only TEXT] [--csv FILE] [--json] [--quick]
    pytest benchmarks/bench_<op>.py                  # the same calls under pytest-benchmark, on the CPU

The floor of a case is the larger of its bytes over the bandwidth of a copy and its operations over the rate
of a matrix product, both measured in the same run. ``share`` is floor / time, on CUDA only: a CPU finds the
inputs in its caches, and no copy bounds that.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environment import COLUMNS, cpu_name, environment
from timing import Ceilings, ceilings, interleaved_us

Call = Callable[[], object]
ROW = (*COLUMNS, "op", "case", "provider", "p20_us", "p50_us", "p80_us", "floor_us", "share", "gb_per_s")
ROW += ("copy_gb_per_s", "bytes", "flops", "threads")


@dataclass
class Case:
    """One problem size: who runs it, how results are compared, and what must move at least.

    Args:
        name: e.g. "B1-N16-V32000-bf16-greedy".
        providers: by name, "eager" and "specfuse" at least; peers where they import.
        check: raises AssertionError unless the providers agree; called before anything is timed.
        bytes: read and written at least. flops: operations at least, 0 where bytes alone decide.
        sizes: problem sizes by letter.
        small: whether it also runs on a CPU.
        compile: eager code to time under torch.compile as the provider "compile".
        compile_mode: of torch.compile.
        samples: what a call works through, where throughput is the figure; told as ``samples_per_s``.
    """

    name: str
    providers: dict[str, Call]
    check: Call
    bytes: int
    flops: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    small: bool = False
    compile: Call | None = None
    compile_mode: str = "default"
    samples: int = 0


class Tuning(NamedTuple):
    """One size to tune: ``call`` runs the op, ``check`` compares it, under each of ``configs``."""

    sizes: dict[str, int]
    configs: list[dict[str, Any]]
    call: Call
    check: Call


Cases = Callable[[str], Iterator[Case]]


def compiled(function: Callable[..., Any], mode: str = "default") -> Callable[..., Any]:
    """``torch.compile`` for fixed shapes, without its own graphs: the harness captures one around it."""
    if mode == "max-autotune":
        mode = "max-autotune-no-cudagraphs"
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def measure(case: Case, device: str, rounds: int, compile: bool, limits: Ceilings) -> list[dict[str, Any]]:
    """Checks the case, times its providers interleaved; one row per provider."""
    case.check()
    providers = dict(case.providers)
    if compile and case.compile is not None:
        providers["compile"] = compiled(case.compile, case.compile_mode)
    times = interleaved_us(providers, device, rounds)
    cold = device == "cuda"
    floor_us = 1e6 * max(case.bytes / limits.bytes_per_s, case.flops / limits.flops_per_s)
    return [
        {
            "case": case.name,
            "provider": provider,
            **spread,
            "floor_us": round(floor_us, 2),
            "share": round(floor_us / spread["p50_us"], 3) if cold else "",
            "gb_per_s": round(case.bytes / spread["p50_us"] / 1e3, 1),
            "copy_gb_per_s": round(limits.bytes_per_s / 1e9, 1),
            "bytes": case.bytes,
            "flops": case.flops,
            "threads": torch.get_num_threads(),
            **({"samples_per_s": round(1e6 * case.samples / spread["p50_us"])} if case.samples else {}),
        }
        for provider, spread in times.items()
    ]


def main(doc: str | None, cases: Cases) -> None:
    """Command line of one benchmark."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=None, help="default 30, with --quick 5")
    parser.add_argument("--quick", action="store_true", help="few rounds, no torch.compile")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--csv", type=Path, help="append one row per case and provider")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    import __main__

    op = Path(__main__.__file__).stem.removeprefix("bench_")
    limits = ceilings(args.device)
    rows: list[dict[str, Any]] = []
    if not args.json:
        machine = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
        print(f"{op} on {machine}, torch {torch.__version__}, {torch.get_num_threads()} threads; ", end="")
        print(f"copy {limits.bytes_per_s / 1e9:.0f} GB/s, product {limits.flops_per_s / 1e12:.2f} TFLOP/s")
    for case in _chosen(cases, args.device, args.only):
        rounds = args.rounds or (5 if args.quick else 30)
        new = measure(case, args.device, rounds, not (args.quick or args.no_compile), limits)
        rows += new
        if not args.json:
            _show(new)
        if args.csv:  # at once: a run that is cut short keeps what it measured
            append_csv(args.csv, op, new)
    if not rows:
        raise SystemExit(f"no case of {op} on {args.device} holds {args.only!r}")
    if args.json:
        print(json.dumps({"op": op, **environment(), "cases": rows}))


def _chosen(cases: Cases, device: str, only: str) -> Iterator[Case]:
    return (case for case in cases(device) if only in case.name and (case.small or device == "cuda"))


def _show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{rows[0]['case']}  floor {rows[0]['floor_us']} us")
    for row in rows:
        spread = "  ".join(f"{key[:3]} {row[key]:10.1f}" for key in ("p20_us", "p50_us", "p80_us"))
        share = "" if row["share"] == "" else f"  {row['share']:6.1%} of the floor"
        samples = f"  {row['samples_per_s']:,} samples/s" if "samples_per_s" in row else ""
        print(f"  {row['provider']:12} {spread} us  {row['gb_per_s']:8.1f} GB/s{share}{samples}")


def append_csv(path: Path, op: str, rows: list[dict[str, Any]]) -> None:
    """Appends rows with this machine's environment under one header."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, ROW, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerows({**_environment(), "op": op, **row} for row in rows)


_environment = functools.cache(environment)


def parametrize(metafunc: Any, cases: Cases) -> None:
    """pytest_generate_tests of a benchmark file: small cases on the CPU, each provider a test."""
    names = [(case.name, provider) for case in _chosen(cases, "cpu", "") for provider in case.providers]
    metafunc.parametrize(("case", "provider"), [(functools.partial(_find, cases, n), p) for n, p in names],
                         ids=[f"{n}-{p}" for n, p in names])  # fmt: skip


def _find(cases: Cases, name: str) -> Case:
    return next(itertools.dropwhile(lambda case: case.name != name, cases("cpu")))


def run_case(benchmark: Any, case: Callable[[], Case], provider: str) -> None:
    """One provider of one case under pytest-benchmark."""
    chosen = case()
    chosen.check()
    benchmark(chosen.providers[provider])
