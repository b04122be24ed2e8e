"""Times implementations of one thing against each other: interleaved; on CUDA graph replay with a cold L2."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

Calls = dict[str, Callable[[], object]]


def interleaved_us(calls: Calls, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Per provider p20, p50, p80 in microseconds; every round runs each once, so a slow moment hits all."""
    timed = {name: _timer(call, device) for name, call in calls.items()}
    for _ in range(3):
        for measure in timed.values():
            measure()
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, measure in timed.items():
            samples[name].append(measure())
    return {name: _percentiles(values) for name, values in samples.items()}


def _percentiles(values: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(values, n=10)
    return {"p20_us": round(fifths[1], 2), "p50_us": round(fifths[4], 2), "p80_us": round(fifths[7], 2)}


def _timer(call: Callable[[], object], device: str) -> Callable[[], float]:
    """One call that runs ``call`` once and returns microseconds."""
    if device != "cuda":

        def on_cpu() -> float:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6

        return on_cpu

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # warm up beside the capture, as torch.cuda.graphs asks
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    cold = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")  # larger than any L2 so far
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def on_cuda() -> float:
        cold.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    return on_cuda


def parser(description: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments.add_argument("--rounds", type=int, default=50)
    arguments.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    arguments.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return arguments


def report(cases: list[dict[str, object]], args: argparse.Namespace) -> None:
    """Prints the cases as JSON or as a table, with the machine they were measured on."""
    machine = torch.cuda.get_device_name() if args.device == "cuda" else _cpu_name()
    if args.json:
        print(json.dumps({"machine": machine, "torch": torch.__version__, "cases": cases}))
        return
    print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds")
    for case in cases:
        print(f"\n{case['case']}  {case.get('note', '')}")
        for name, times in case["times"].items():  # type: ignore[attr-defined]
            print(f"  {name:10} " + "  ".join(f"{key[:3]} {value:10.1f} us" for key, value in times.items()))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
