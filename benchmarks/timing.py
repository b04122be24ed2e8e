"""Times implementations of one thing against each other: interleaved; on CUDA graph replay with a cold L2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Calls = dict[str, Callable[[], object]]
FLUSH_BYTES = 256 * 2**20  # larger than any L2 so far


class Ceilings(NamedTuple):
    """What this device reaches at best, measured: bytes read plus written by a copy, a matrix product."""

    bytes_per_s: float
    flops_per_s: float


def ceilings(device: str) -> Ceilings:
    """Measures a large copy and a large bf16 (CPU: fp32) matrix product, the best of a few runs."""
    on_cuda = device == "cuda"
    words, side = (2**28, 8192) if on_cuda else (2**25, 512)
    source = torch.randn(words, device=device)
    target = torch.empty_like(source)
    a, b = (
        torch.randn(side, side, device=device, dtype=torch.bfloat16 if on_cuda else torch.float32)
        for _ in "ab"
    )
    copy_us = min(_samples(lambda: target.copy_(source), device, 5))
    product_us = min(_samples(lambda: a @ b, device, 5))
    return Ceilings(2 * source.nbytes / copy_us * 1e6, 2 * side**3 / product_us * 1e6)


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


def _samples(call: Callable[[], object], device: str, rounds: int) -> list[float]:
    measure = _timer(call, device)
    return [measure() for _ in range(rounds + 2)][2:]


def _percentiles(values: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(values, n=10)
    return {"p20_us": round(fifths[1], 2), "p50_us": round(fifths[4], 2), "p80_us": round(fifths[7], 2)}


def _timer(call: Callable[[], object], device: str) -> Callable[[], float]:
    """One call that runs ``call`` once and returns microseconds."""
    return _graph_timer(call) if device == "cuda" else lambda: _wall_us(call)


def _wall_us(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def _graph_timer(call: Callable[[], object]) -> Callable[[], float]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # warm up beside the capture, as torch.cuda.graphs asks
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    cold = _cold_buffer()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay_us() -> float:
        # Reading leaves clean lines behind: written ones would be evicted at the measured kernel's expense.
        # It also keeps the device busy while the host enqueues what is measured.
        cold.sum()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    return replay_us


_buffers: list[torch.Tensor] = []


def _cold_buffer() -> torch.Tensor:
    if not _buffers:
        _buffers.append(torch.ones(FLUSH_BYTES // 4, device="cuda"))
    return _buffers[0]
