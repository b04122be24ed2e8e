"""The simulated event camera against its equations, and on the driving world."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specfuse.data.world import events
from specfuse.events import Sensor, simulate
from specfuse.events.simulate import IDEAL, LINEAR_BELOW, log_brightness

SECOND = np.array([0.0, 1e6])


def two(before: float, after: float) -> np.ndarray:
    return np.array([[[before]], [[after]]])


def test_the_logarithm_has_a_linear_toe() -> None:
    assert log_brightness(np.array([0.0]))[0] == 0
    assert log_brightness(np.array([10.0]))[0] == pytest.approx(np.log(20) / 2)
    assert log_brightness(np.array([100.0]))[0] == pytest.approx(np.log(100))
    around = log_brightness(np.array([LINEAR_BELOW - 1e-9, LINEAR_BELOW]))
    assert around[1] - around[0] < 1e-8


@settings(max_examples=80)
@given(st.floats(0, 255), st.floats(0, 255), st.floats(0.1, 0.6), st.floats(0.1, 0.6))
def test_as_many_events_as_thresholds_fit_in_the_change(
    before: float, after: float, on: float, off: float
) -> None:
    change = float(np.diff(log_brightness(np.array([before, after])))[0])
    exact = change / on if change > 0 else -change / off
    stream = simulate(two(before, after), SECOND, replace(IDEAL, threshold_on=on, threshold_off=off))
    if abs(exact - round(exact)) > 1e-9:
        # The event that falls on the very end belongs to the next interval; elsewhere the count is exact.
        assert len(stream) == int(exact)
    assert set(stream.p.tolist()) <= ({1} if change > 0 else {0})


def test_in_many_steps_nothing_is_lost() -> None:
    ramp = np.exp(np.linspace(np.log(30), np.log(250), 100))[:, None, None]
    stream = simulate(ramp, np.linspace(0, 1e6, 100), replace(IDEAL, threshold_on=0.13))
    assert len(stream) == int(np.log(250 / 30) / 0.13)
    # Brightness grows evenly in the logarithm, so events come at even times.
    assert np.ptp(np.diff(stream.t)) <= 2
    back = simulate(ramp[::-1], np.linspace(0, 1e6, 100), replace(IDEAL, threshold_off=0.13))
    assert len(back) == len(stream) and back.p.max() == 0


def test_events_fall_where_the_line_crosses_the_levels() -> None:
    stream = simulate(two(50, 50 * np.e), SECOND + 7e6, replace(IDEAL, threshold_on=0.3))
    assert stream.t.tolist() == [7_300_000 - (stream.t[0] < 7_300_000), *stream.t[1:].tolist()]
    np.testing.assert_allclose(stream.t, 7e6 + 1e6 * np.array([0.3, 0.6, 0.9]), atol=1.5)


def test_a_static_scene_without_noise_is_silent() -> None:
    still = np.repeat(np.random.default_rng(0).uniform(0, 255, (1, 9, 7)), 20, axis=0)
    times = np.linspace(0, 1e6, 20)
    assert len(simulate(still, times)) == 0
    assert len(simulate(still, times, Sensor(leak_hz=0, shot_hz=0))) == 0
    assert len(simulate(still, times, Sensor(leak_hz=5, shot_hz=0))) > 0
    assert len(simulate(still, times, Sensor(leak_hz=0, shot_hz=5))) > 0


def test_noise_has_its_rates() -> None:
    grey = np.full((11, 40, 50), 100.0)
    times = np.linspace(0, 1e6, 11)
    leak = simulate(grey, times, replace(IDEAL, leak_hz=3.0))
    assert leak.p.min() == 1 and len(leak) == pytest.approx(3 * 2000, rel=0.05)
    shot = simulate(grey, times, replace(IDEAL, shot_hz=4.0))
    assert len(shot) == pytest.approx(4 * (1 - 0.75 * 100 / 255) * 2000, rel=0.05)
    assert 0.45 < shot.p.mean() < 0.55


def test_mismatch_spreads_the_thresholds() -> None:
    step = np.stack([np.full((40, 50), 40.0), np.full((40, 50), 200.0)])
    counts = []
    for mismatch in (0.0, 0.05):
        stream = simulate(step, SECOND, replace(IDEAL, mismatch=mismatch))
        counts.append(np.bincount(stream.y.astype(int) * 50 + stream.x, minlength=2000))
    assert counts[0].std() == 0 and counts[1].std() > 0.5
    assert counts[1].mean() == pytest.approx(counts[0].mean(), rel=0.2)


@pytest.mark.parametrize("rest", [0, 1000, 50_000])
def test_a_pixel_rests_after_an_event(rest: int) -> None:
    rng = np.random.default_rng(1)
    flicker = rng.uniform(0, 255, (30, 8, 8))
    times = np.linspace(0, 1e6, 30)
    stream = simulate(flicker, times, replace(IDEAL, refractory_us=rest))
    pixel = stream.y.astype(int) * 8 + stream.x
    gaps = np.concatenate([np.diff(stream.t[pixel == k]) for k in range(64)])
    assert gaps.min() >= rest
    # A greedy filter over the events without rest keeps the same ones.
    free = simulate(flicker, times, IDEAL)
    last, kept = {}, []
    for x, y, t, p in zip(free.x, free.y, free.t, free.p, strict=True):
        if t - last.get((x, y), -(10**9)) >= rest:
            last[x, y] = t
            kept.append((x, y, t, p))
    assert len(kept) == len(stream)
    assert [k[2] for k in kept] == stream.t.tolist()


@pytest.mark.parametrize("index", [3, 1500, 4000])
def test_events_of_a_clip(index: int) -> None:
    stream = events(index, size=32, rate=64)
    assert len(stream) > 200 and (stream.width, stream.height) == (32, 32)
    assert (np.diff(stream.t) >= 0).all() and stream.t[0] >= 0 and stream.t[-1] < 1_000_000
    assert 0.15 < stream.p.mean() < 0.85
    again = events(index, size=32, rate=64)
    assert all(np.array_equal(getattr(stream, c), getattr(again, c)) for c in "xytp")
    other = events(index, size=32, rate=64, world_seed=5)
    assert len(other) != len(stream)


def test_the_same_seed_gives_the_same_noise_and_another_does_not() -> None:
    grey = np.full((3, 8, 8), 90.0)
    a, b, c = (simulate(grey, np.array([0, 5e5, 1e6]), Sensor(shot_hz=20), seed=s) for s in (1, 1, 2))
    assert np.array_equal(a.t, b.t) and not np.array_equal(a.t, c.t)


@pytest.mark.parametrize(
    ("brightness", "times", "message"),
    [
        (np.zeros((1, 2, 2)), [0.0], "at least two pictures"),
        (np.zeros((2, 2)), [0.0, 1.0], r"got shape \(2, 2\)"),
        (np.zeros((2, 2, 2)), [0.0], r"times_us must be \[2\]"),
        (np.zeros((2, 2, 2)), [1.0, 1.0], r"times_us\[1\] = 1.0 follows 1.0"),
        (np.full((2, 2, 2), 256.0), [0.0, 1.0], "0 to 255"),
        (np.full((2, 2, 2), np.nan), [0.0, 1.0], "0 to 255"),
    ],
)
def test_bad_pictures(brightness: np.ndarray, times: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(brightness, np.array(times))


@pytest.mark.parametrize(
    "wrong", [{"threshold_on": 0.0}, {"threshold_off": -1.0}, {"shot_hz": -0.1}, {"leak_hz": float("nan")}]
)
def test_bad_sensors(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sensor(**wrong)


def test_rate_is_checked() -> None:
    with pytest.raises(ValueError, match="rate must be at least 2 pictures a second, got 1"):
        events(0, rate=1)
