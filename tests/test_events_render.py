"""EventGPT's pictures, byte for byte against a plain loop."""

from __future__ import annotations

import time

import numpy as np
import pytest
from event_cases import noise
from hypothesis import given, settings
from hypothesis import strategies as st

from specfuse.events import EventStream, render_eventgpt


def loop(stream: EventStream, num_images: int, size: tuple[int, int] | str | None) -> list[np.ndarray]:
    each, images = len(stream) // num_images, []
    for i in range(num_images):
        piece = slice(i * each, (i + 1) * each if i < num_images - 1 else len(stream))
        x, y, p = stream.x[piece], stream.y[piece], stream.p[piece]
        if size == "infer":
            height, width = y.max() + 1, x.max() + 1
        else:
            height, width = (stream.height, stream.width) if size is None else size
        image = np.full((height, width, 3), 255, np.uint8)
        for px, py, polarity in zip(x, y, p, strict=True):
            image[py, px] = (0, 0, 255) if polarity == 0 else (255, 0, 0)
        images.append(image)
    return images


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(
        m.shape == n.shape and m.dtype == n.dtype and np.array_equal(m, n) for m, n in zip(a, b, strict=True)
    )


@settings(deadline=None)
@given(
    st.integers(0, 300),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(0, 99),
    st.booleans(),
)
def test_as_the_loop(count: int, width: int, height: int, images: int, seed: int, larger: bool) -> None:
    stream = noise(count, width, height, seed)
    size = (height + 3, width + 2) if larger else None
    assert same(render_eventgpt(stream, images, size), loop(stream, images, size))
    if count >= images:
        assert same(render_eventgpt(stream, images, "infer"), loop(stream, images, "infer"))


def test_as_the_loop_on_a_real_sensor_size() -> None:
    stream = noise(400_003, 640, 480)
    assert same(render_eventgpt(stream, 3, "infer"), loop(stream, 3, "infer"))
    start = time.process_time()
    expected = loop(stream, 5, None)
    loop_s = time.process_time() - start
    seconds = []
    for _ in range(5):
        start = time.process_time()
        images = render_eventgpt(stream)
        seconds.append(time.process_time() - start)
    assert same(images, expected)
    # Promised are 30 times (benchmarks/bench_events.py); a busy machine may take half of that.
    assert loop_s > 15 * min(seconds)


def test_the_last_event_of_a_pixel_decides() -> None:
    stream = EventStream([1, 1, 1], [0, 0, 0], [5, 5, 6], [1, 0, 1], 3, 2)
    image = render_eventgpt(stream, 1)[0]
    assert image.tolist() == [[[255] * 3, [255, 0, 0], [255] * 3], [[255] * 3] * 3]
    assert render_eventgpt(stream.by_index(0, 2), 1)[0][0, 1].tolist() == [0, 0, 255]


def test_fewer_events_than_pictures() -> None:
    images = render_eventgpt(noise(3, 4, 4), 5)
    assert [int((image != 255).any()) for image in images] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("count", "images", "size", "message"),
    [
        (10, 0, None, "num_images must be at least 1, got 0"),
        (3, 5, "infer", "piece 0 holds no events"),
        (10, 1, "sensor", "got 'sensor'"),
        (500, 1, (3, 4), r"size \(3, 4\) is too small: events of piece 0 need \(4, 4\)"),
        (0, 1, (0, 4), "too small"),
    ],
)
def test_bad_arguments(count: int, images: int, size: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_eventgpt(noise(count, 4, 4), images, size)
