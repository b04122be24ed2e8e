"""The driving world's pictures: anti-aliasing, order, and that a picture depends on its time alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from world_cases import sample

from specfuse.data.world import clip, render
from specfuse.data.world.camera import on_road, to_road
from specfuse.data.world.canvas import Canvas
from specfuse.data.world.scene import FRAME_TIMES, Scene, Thing
from specfuse.data.world.visible import build_scene

RED = np.array([255.0, 0, 0], np.float32)


def blank(frames: int = 1, size: int = 16) -> Canvas:
    return Canvas(np.zeros((frames, size, size, 3), np.float32), frames, size, 2)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.floats(0.05, 0.95)] * 4))
def test_a_rectangle_covers_its_area(edges: tuple[float, float, float, float]) -> None:
    (x0, x1), (y0, y1) = sorted(edges[:2]), sorted(edges[2:])
    canvas = blank()
    canvas.rectangle(np.array([[x0, y0]]), np.array([[x1, y1]]), RED, 0)
    assert canvas.rgb is not None
    assert canvas.rgb[..., 0].sum() / 255 == pytest.approx((x1 - x0) * (y1 - y0) * 256, rel=1e-4, abs=1e-3)


def test_a_quad_and_an_ellipse_cover_about_their_area() -> None:
    canvas = blank(size=64)
    corners = np.array([[[0.1, 0.1], [0.8, 0.2], [0.7, 0.9], [0.2, 0.6]]])
    x, y = corners[0].T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    canvas.quad(corners, RED, 0)
    assert canvas.rgb is not None
    assert canvas.rgb[..., 0].mean() / 255 == pytest.approx(area, rel=0.02)
    turned = blank(size=64)
    turned.quad(corners[:, ::-1], RED, 0)
    assert turned.rgb is not None
    np.testing.assert_allclose(turned.rgb, canvas.rgb, atol=1e-3)
    round_ = blank(size=64)
    round_.ellipse(np.array([[0.2, 0.3]]), np.array([[0.8, 0.7]]), RED, 0)
    assert round_.rgb is not None
    assert round_.rgb[..., 0].mean() / 255 == pytest.approx(np.pi * 0.3 * 0.2, rel=0.02)


def test_the_nearer_thing_owns_the_pixels() -> None:
    canvas = blank()
    square = np.array([[0.25, 0.25]]), np.array([[0.75, 0.75]])
    canvas.rectangle(*square, RED, 0)
    canvas.rectangle(*square, RED, 1)
    assert np.unique(canvas.owner).tolist() == [-1, 1]
    assert canvas.drawn[:, 0].tolist() == [64, 64]


@settings(max_examples=12, deadline=None)
@example(618, [1.0, 0.0])  # two trees that touch by a leaf
@given(st.integers(0, 5207), st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_a_picture_depends_on_its_own_time_only(index: int, times: list[float]) -> None:
    scene = build_scene(index)[0]
    together = render.render(scene, np.array(times), 32)
    for i, time in enumerate(times):
        alone = render.render(scene, np.array([time]), 32)
        assert np.array_equal(together.owner[i], alone.owner[0])
        # Soft edges of two things that touch may be blended in another order, in a pixel here and there.
        assert together.rgb is not None and alone.rgb is not None
        apart = np.abs(together.rgb[i] - alone.rgb[0])
        assert apart.max() < 24 and (apart > 0.05).mean() < 0.02


def test_colours_stay_in_range() -> None:
    for drawn in sample()[::6]:
        rgb = render.render(drawn.scene, FRAME_TIMES[:2], 16).rgb
        assert rgb is not None
        assert rgb.min() > -0.01 and rgb.max() < 255.01


def test_a_high_rate_passes_through_the_video_frames() -> None:
    scene = build_scene(1234)[0]
    fast = render.frames(scene, np.arange(64) / 64)
    assert np.abs(fast[::8].astype(int) - render.frames(scene, FRAME_TIMES)).max() <= 1


def test_leaving_out_colours_changes_nothing_else() -> None:
    scene = build_scene(77)[0]
    a, b = render.render(scene), render.render(scene, colour=False)
    assert b.rgb is None
    assert np.array_equal(a.owner, b.owner) and np.array_equal(a.drawn, b.drawn)


@pytest.mark.parametrize("size", [8, 31, 48, 64, 224])
def test_any_size(size: int) -> None:
    frames = clip(42, size=size).frames
    assert frames.shape == (8, size, size, 3) and frames.dtype == np.uint8
    assert frames.std() > 5


def test_sizes_show_the_same() -> None:
    for index in (42, 1042, 2042):
        large = clip(index, size=128).frames.astype(float).reshape(8, 64, 2, 64, 2, 3).mean((2, 4))
        assert np.abs(large - clip(index, size=64).frames).mean() < 6


def test_frames_are_the_same_every_time() -> None:
    first = clip(99).frames
    build_scene.cache_clear()
    assert np.array_equal(clip(99).frames, first)
    assert not np.array_equal(clip(99, world_seed=1).frames, first)


def test_a_moving_car_sees_more_change_than_a_standing_one() -> None:
    def change(pace: str) -> float:
        found = [e for e in sample() if e.scene.ego.pace == pace and e.scene.weather in ("clear", "fog")]
        bare = [replace(e.scene, things=(), light="day") for e in found[:10]]
        return float(np.mean([np.abs(np.diff(render.render(s, size=32).rgb, axis=0)).mean() for s in bare]))

    assert change("fast") > 2 * change("standing")


def test_a_turn_moves_the_hills_the_other_way() -> None:
    scene = next(e.scene for e in sample() if e.scene.ego.turn == "right" and e.scene.road == "junction")
    for turn in (1, -1):
        ego = replace(scene.ego, yaw_rate=turn * 0.3)
        far = Thing("truck", 25.0, 0.0, colour="red")
        turned: Scene = replace(scene, ego=ego, things=(far,))
        columns = [np.nonzero(o == 0)[1].mean() for o in render.render(turned, np.array([0.0, 0.9])).owner]
        assert (columns[1] - columns[0]) * turn < -5


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 30), st.floats(-8, 8), st.sampled_from([0.0, 1 / 24, -1 / 24]))
def test_road_coordinates_invert(s: float, lateral: float, curvature: float) -> None:
    scene = replace(build_scene(0)[0], curvature=curvature)
    x, z = on_road(scene, np.array([s]), np.array([lateral]))
    back = to_road(scene, x, z)
    assert back[0][0] == pytest.approx(s, abs=1e-6) and back[1][0] == pytest.approx(lateral, abs=1e-6)


def test_bad_arguments() -> None:
    scene = build_scene(0)[0]
    with pytest.raises(ValueError, match="size must be at least 8 pixels, got 7"):
        render.render(scene, size=7)
    with pytest.raises(ValueError, match=r"times must be \[T\], got shape \(1, 1\)"):
        render.render(scene, np.zeros((1, 1)))
