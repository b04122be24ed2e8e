"""Counts, voxel grid and time surface against plain loops, and torch against NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from event_cases import noise, streams
from hypothesis import given, settings
from hypothesis import strategies as st

from specfuse.events import EventStream, EventTensors, counts, render_eventgpt, time_surface, voxel_grid


def counts_loop(events: EventStream) -> np.ndarray:
    out = np.zeros((2, events.height, events.width), int)
    for x, y, p in zip(events.x, events.y, events.p, strict=True):
        out[p, y, x] += 1
    return out


def voxel_loop(events: EventStream, bins: int, start: int, stop: int) -> np.ndarray:
    out = np.zeros((bins, events.height, events.width))
    for x, y, t, p in zip(events.x, events.y, events.t.tolist(), events.p, strict=True):
        at = (bins - 1) * (t - start) / (stop - start) if stop > start else 0.0
        for b in range(bins):
            out[b, y, x] += (2.0 * p - 1) * max(0.0, 1 - abs(b - at))
    return out


def surface_loop(events: EventStream, tau: float, at: int) -> np.ndarray:
    out = np.zeros((2, events.height, events.width))
    for x, y, t, p in zip(events.x, events.y, events.t.tolist(), events.p, strict=True):
        out[p, y, x] = np.exp((t - at) / tau)
    return out


@settings(deadline=None)
@given(streams(), st.integers(1, 6), st.integers(0, 50), st.integers(0, 50))
def test_as_the_loops(events: EventStream, bins: int, before: int, after: int) -> None:
    assert counts(events).dtype == np.int32 and np.array_equal(counts(events), counts_loop(events))
    first, last = (int(events.t[0]), int(events.t[-1])) if len(events) else (0, 0)
    start, stop = first - before, last + after
    close: Callable[..., None] = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5)  # noqa: E731
    close(voxel_grid(events, bins, start, stop), voxel_loop(events, bins, start, stop))
    close(voxel_grid(events, bins), voxel_loop(events, bins, first, last))
    close(time_surface(events, 5e4, stop), surface_loop(events, 5e4, stop))
    assert voxel_grid(events, bins).dtype == time_surface(events, 5e4).dtype == np.float32


@settings(deadline=None)  # the first call of torch takes its time
@given(streams(1), st.integers(1, 5))
def test_torch_as_numpy(events: EventStream, bins: int) -> None:
    tensors = EventTensors.of(events)
    assert torch.equal(counts(tensors), torch.from_numpy(counts(events)))
    torch.testing.assert_close(voxel_grid(tensors, bins), torch.from_numpy(voxel_grid(events, bins)))
    start, stop = int(events.t[0]) - 7, int(events.t[-1]) + 7
    given_times = voxel_grid(tensors, bins, start, stop)
    torch.testing.assert_close(given_times, torch.from_numpy(voxel_grid(events, bins, start, stop)))
    surface = time_surface(tensors, 3e4, stop)
    torch.testing.assert_close(surface, torch.from_numpy(time_surface(events, 3e4, stop)))
    for size in (None, "infer", (9, 9)):
        parts = 1 if size == "infer" else 3
        pairs = zip(render_eventgpt(tensors, parts, size), render_eventgpt(events, parts, size), strict=True)
        assert all(torch.equal(a, torch.from_numpy(b)) and a.dtype == torch.uint8 for a, b in pairs)


@pytest.mark.gpu
def test_a_gpu_as_the_cpu() -> None:
    events = noise(300_000, 64, 48)
    here, there = EventTensors.of(events), EventTensors.of(events, "cuda")
    assert all(
        torch.equal(a.cpu(), b) for a, b in zip(render_eventgpt(there), render_eventgpt(here), strict=True)
    )
    assert torch.equal(counts(there).cpu(), counts(here))
    torch.testing.assert_close(voxel_grid(there, 5).cpu(), voxel_grid(here, 5), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(time_surface(there, 1e5).cpu(), time_surface(here, 1e5))


def test_all_of_the_torch_side_sees_large_coordinates() -> None:
    events = EventStream([40_000, 3], [0, 1], [0, 1], [1, 0], 40_001, 2)
    assert counts(EventTensors.of(events))[1, 0, 40_000] == 1
    assert EventTensors.of(events).x.tolist() == [40_000, 3]


def test_pieces_of_tensors_are_those_of_the_stream() -> None:
    events = noise(11, 4, 4, start_us=10**12)
    pieces = zip(EventTensors.of(events).split(3), events.split(3), strict=True)
    assert all((a.t + a.origin_us).tolist() == b.t.tolist() for a, b in pieces)


def test_voxels_keep_the_sum_of_polarities() -> None:
    events = noise(1000, 5, 5)
    balance = counts(events)[1] - counts(events)[0]
    np.testing.assert_allclose(voxel_grid(events, 7).sum(0), balance, atol=1e-4)


@pytest.mark.parametrize("make", [lambda s: s, EventTensors.of], ids=["numpy", "torch"])
def test_bad_arguments(make: Callable[[EventStream], EventStream]) -> None:
    events = make(EventStream([0, 1], [0, 0], [10, 20], [0, 1], 2, 1))
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        voxel_grid(events, 0)
    with pytest.raises(ValueError, match=r"events from 10 to 20 us do not lie between .* 11 and 20 us"):
        voxel_grid(events, 2, start_us=11)
    with pytest.raises(ValueError, match="10 to 20 us do not lie between the times given, 10 and 15 us"):
        time_surface(events, 1.0, at_us=15)
    with pytest.raises(ValueError, match="tau_us must be above 0, got 0"):
        time_surface(events, 0)
