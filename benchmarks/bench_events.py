"""One-second samples of an event camera on the way to EventGPT's pictures: loading, drawing, reading ahead.

    python benchmarks/bench_events.py [--samples 8] [--rate 2.7] [--compute-ms 150] [--json]

A sample is one second of 640 x 480 pixels: a real recording of 50 ms, repeated (../shared/data or
SPECFUSE_SHARED_DATA; its 2.7 million events a second are DSEC's), or, without it and with --rate, random
events along moving edges, so many million a second. Every sample is a file of its own, and what was just
written is in the page cache: figures are of unpacking and drawing, not of the disk.

  drawing     pictures of a sample, by a plain loop over the events and by render_eventgpt; equal to the byte
  stage 1     loading and drawing of a sample. "before" is EventGPT's way: unpickling, then the loop
  hidden      what loading and drawing add to a step of --compute-ms on a device that the processor waits
              for, as for a GPU: in turn, and with specfuse.events.dataset.prefetch

Promised are 30 times the loop and at most 0.1 s for stage 1 (0.98 s in the notes that this follows). Both are
judged by processor time, which is the time by the clock where nothing else runs; both are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from environment import environment

from specfuse.events import EventStream, load, render_eventgpt, save
from specfuse.events.dataset import EventWindows, Window, prefetch

LIMITS = {"times_faster_than_the_loop": 30.0, "stage_1_s": 0.1}
SECOND = 1_000_000


def sample(rate: float | None, seed: int) -> EventStream:
    """One second of events from time 0 on."""
    folder = Path(os.environ.get("SPECFUSE_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared/data"))
    path = folder / "dsec_events_interlaken.npz"
    if rate is None and path.exists():
        part = load(path)
        length = SECOND // 20
        columns = [np.tile(getattr(part, name), 20) for name in "xyp"]
        t = np.concatenate([part.t - part.t[0] + length * i for i in range(20)])
        keep = t < SECOND
        # Every sample differs from the last, as files of a recording do.
        x = (columns[0] + np.uint16(7 * seed)) % part.width
        return EventStream(x[keep], columns[1][keep], t[keep], columns[2][keep], part.width, part.height)
    rng = np.random.default_rng(seed)
    count = int((rate or 2.7) * SECOND)
    t = np.sort(rng.integers(0, SECOND, count))
    edge = rng.integers(0, 40, count)
    x = (edge * 16 + t // 10_000 + rng.integers(0, 3, count)) % 640
    return EventStream(
        x, (edge * 37 + rng.integers(0, 200, count)) % 480, t, rng.integers(0, 2, count), 640, 480
    )


def loop(stream: EventStream) -> list[np.ndarray]:
    """EventGPT's pictures by the definition."""
    images = []
    for piece in stream.split(5):
        image = np.full((piece.height, piece.width, 3), 255, np.uint8)
        for x, y, p in zip(piece.x, piece.y, piece.p, strict=True):
            image[y, x] = (0, 0, 255) if p == 0 else (255, 0, 0)
        images.append(image)
    return images


def write(folder: Path, samples: int, rate: float | None) -> list[int]:
    """Writes every sample in all formats; returns how many events each has."""
    counts = []
    for i in range(samples):
        stream = sample(rate, i)
        counts.append(len(stream))
        save(folder / f"{i}.npz", stream)
        save(folder / f"{i}.compressed.npz", stream, compress=True)
        if has_h5py():
            save(folder / f"{i}.h5", stream)
        arrays: Any = {"x": stream.x, "y": stream.y, "t": stream.t, "p": stream.p}
        np.save(folder / f"{i}.npy", arrays, allow_pickle=True)
    return counts


def has_h5py() -> bool:
    """Whether HDF5 can be written here."""
    try:
        import h5py  # noqa: F401
        import hdf5plugin  # noqa: F401
    except ImportError:
        return False
    return True


def before(path: Path) -> list[np.ndarray]:
    """Stage 1 as EventGPT does it: the pickle is our own, and so it may run."""
    held = np.load(path, allow_pickle=True).item()
    return loop(EventStream(held["x"], held["y"], held["t"], held["p"], 640, 480))


class Spent(NamedTuple):
    """Seconds of a call."""

    cpu: float
    wall: float


def seconds(calls: Iterable[Callable[[], object]]) -> Spent:
    """Median times of calls."""
    spent = []
    for call in calls:
        start = time.process_time(), time.perf_counter()
        call()
        spent.append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return Spent(*(statistics.median(column) for column in zip(*spent, strict=True)))


def stages(folder: Path, samples: int) -> Iterator[tuple[str, Spent]]:
    """Stage 1 by format: ``(name, seconds a sample)``."""
    yield (
        "before: pickled .npy, plain loop",
        seconds((lambda i=i: before(folder / f"{i}.npy")) for i in range(min(samples, 3))),
    )
    names = {"pickled .npy, read without running it": "npy", ".npz, compressed": "compressed.npz"}
    names |= {"DSEC's HDF5 (Blosc)": "h5"} if has_h5py() else {}
    for name, suffix in {**names, ".npz, memory-mapped": "npz"}.items():
        windows = [Window(str(folder / f"{i}.{suffix}"), 0, SECOND) for i in range(samples)]
        data = EventWindows(windows, size=(480, 640))
        yield name, seconds((lambda i=i, data=data: data[i]) for i in range(samples))


def hidden(folder: Path, samples: int, compute_ms: float) -> dict[str, float]:
    """Milliseconds that loading and drawing add to a step, by how they are done."""
    data = EventWindows([Window(str(folder / f"{i}.npz"), 0, SECOND) for i in range(samples)] * 2)
    ways: dict[str, Callable[[], Iterable[Any]]] = {
        "in turn": lambda: (data[i] for i in range(len(data))),
        "prefetch, 1 thread": lambda: prefetch(data, ahead=2, workers=1),
        "prefetch, 2 threads": lambda: prefetch(data, ahead=4, workers=2),
    }

    def step() -> float:
        start = time.perf_counter()
        time.sleep(compute_ms / 1e3)
        return time.perf_counter() - start

    found = {}
    for name, items in ways.items():
        start = time.perf_counter()
        computed = sum(step() for _ in items())
        found[name] = (time.perf_counter() - start - computed) / len(data) * 1e3
    return found


def measure(folder: Path, samples: int, rate: float | None, compute_ms: float) -> dict[str, Any]:
    """All figures of a run; what is drawn is compared first."""
    counts = write(folder, samples, rate)
    stream = load(folder / "0.npz")
    expected: list[np.ndarray] = []
    looped = seconds([lambda: expected.extend(loop(stream))])
    if not all(np.array_equal(a, b) for a, b in zip(render_eventgpt(stream), expected, strict=True)):
        raise AssertionError("render_eventgpt and the loop differ")
    drawn = seconds((lambda: render_eventgpt(stream)) for _ in range(9))
    stage = {name: spent._asdict() for name, spent in stages(folder, samples)}
    return {
        **environment(),
        "events_per_sample": statistics.mean(counts),
        "loop_s": looped._asdict(),
        "render_s": drawn._asdict(),
        "times_faster_than_the_loop": looped.cpu / drawn.cpu,
        "stage_1_s": stage,
        "added_ms": hidden(folder, samples, compute_ms),
    }


def main() -> None:
    """Prints the figures; leaves with 1 if a promise does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rate", type=float, help="million random events a second instead of a recording")
    parser.add_argument("--compute-ms", type=float, default=150.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.samples, options.rate, options.compute_ms)
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        print(f"{figures['cpu']}, commit {figures['commit']}")
        print(f"{figures['events_per_sample'] / 1e6:.2f} million events a sample")
        print(f"\n{'drawing':<42}{'cpu s':>8}{'wall s':>8}")
        rows = {"plain loop": figures["loop_s"], "render_eventgpt": figures["render_s"]}
        show(rows)
        print(f"  {figures['times_faster_than_the_loop']:.0f} times faster")
        print("\nstage 1, of one sample")
        show(figures["stage_1_s"])
        print(f"\nadded to a step of {options.compute_ms:.0f} ms")
        for name, value in figures["added_ms"].items():
            print(f"  {name:<40}{value:8.1f} ms")
    fast = figures["times_faster_than_the_loop"] >= LIMITS["times_faster_than_the_loop"]
    stage = figures["stage_1_s"][".npz, memory-mapped"]["cpu"]
    sys.exit(0 if fast and stage <= LIMITS["stage_1_s"] else 1)


def show(rows: dict[str, dict[str, float]]) -> None:
    """Prints a line for each row."""
    for name, spent in rows.items():
        print(f"  {name:<40}{spent['cpu']:8.3f}{spent['wall']:8.3f}")


if __name__ == "__main__":
    main()
