"""Event streams that several tests look at, and hypothesis strategies for them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from specfuse.events import EventStream


def noise(count: int, width: int, height: int, seed: int = 0, start_us: int = 0) -> EventStream:
    """Events at random places within one second, many at the same time when there are many."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, width, count), rng.integers(0, height, count)
    t = start_us + np.sort(rng.integers(0, 10**6, count))
    return EventStream(x, y, t, rng.integers(0, 2, count), width, height)


def streams(least: int = 0) -> st.SearchStrategy[EventStream]:
    """Small streams of all kinds of sensor, far from time 0 or near it."""
    sides, starts = st.integers(1, 9), st.sampled_from([0, -5, 51_837_449_776])
    return st.builds(noise, st.integers(least, 200), sides, sides, st.integers(0, 999), starts)


def same(a: EventStream, b: EventStream) -> bool:
    """Whether two streams hold the same events of the same sensor."""
    columns = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in "xytp")
    return columns and (a.width, a.height) == (b.width, b.height)
