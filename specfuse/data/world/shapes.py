"""What things look like: flat parts in metres, turned into shapes on the canvas."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from specfuse.data.world.camera import FOCAL, NEAR, Pose, project
from specfuse.data.world.canvas import Canvas
from specfuse.data.world.light import Air
from specfuse.data.world.scene import COLOURS, Thing

Colour = tuple[int, int, int]
RUBBER, GLASS, BRIGHT_GLASS = (20, 20, 22), (38, 50, 70), (150, 195, 225)
TAIL, BRAKE, BEAM = (190, 10, 20), (255, 30, 30), (255, 255, 205)
TROUSERS, STEPS_PER_SECOND = (40, 44, 62), 1.5
SKIN, METAL, TRUNK = (236, 188, 150), (120, 120, 126), (96, 66, 40)
CLOTHES = ((228, 40, 150), (245, 130, 25), (140, 60, 205))
WALLS = ((176, 84, 66), (198, 170, 130), (120, 130, 150), (206, 196, 186))
LEAVES = ((34, 110, 40), (60, 128, 36), (24, 92, 58))
LAMPS = {"red": (255, 30, 25), "yellow": (255, 205, 0), "green": (20, 235, 90)}


# Larger than life: a picture of 64 pixels must show them.
CHUNKY = {"car": 1.1, "truck": 1.1, "pedestrian": 1.25, "cyclist": 1.25, "signal": 1.2, "sign": 1.2}


MARGIN = 0.12  # picture widths: anti-aliasing, crowns of trees, a leaning camera


class Part(NamedTuple):
    """A flat patch of a thing that faces the camera; metres from the middle of its foot, up positive."""

    left: float
    right: float
    low: float
    high: float
    colour: Colour
    round: bool = False
    glows: bool = False
    swing: tuple[float, float] = (0.0, 0.0)  # metres right and up that it goes to and fro, as legs do


class Sheet(NamedTuple):
    """The P parts of a thing as arrays, back to front."""

    lo: np.ndarray  # [P, 1, 2] right, down
    hi: np.ndarray  # [P, 1, 2]
    swing: np.ndarray  # [P, 1, 2] right, down
    colour: np.ndarray  # [P, 1, 3]
    round: list[bool]
    glows: np.ndarray  # [P, 1, 1] bool


def paint(
    canvas: Canvas, thing: Thing, index: int, eye: Pose, air: Air, place: tuple, times: np.ndarray
) -> None:
    """Paints one thing whose foot is at camera coordinates ``place`` (x, z), each ``[T]``."""
    x, z = place
    dark = air.things[0] < 0.7
    if thing.kind == "building":
        _paint_building(canvas, thing, index, eye, air, x, z, dark)
        return
    sheet = _sheet(thing.kind, thing.pose, thing.colour, thing.height, thing.shade, dark)
    foot = project(eye, x, 0.0, z)
    scale = (CHUNKY.get(thing.kind, 1.0) * FOCAL / np.maximum(z, NEAR))[:, None]
    sway = np.sin(2 * np.pi * STEPS_PER_SECOND * times)[:, None]
    middle = foot + scale * sheet.swing * sway  # [P, T, 2]
    lo, hi = middle + sheet.lo * scale, middle + sheet.hi * scale
    colour = np.where(sheet.glows, air.on_thing(sheet.colour, z, True), air.on_thing(sheet.colour, z))
    for k, is_round in enumerate(sheet.round):
        (canvas.ellipse if is_round else canvas.rectangle)(lo[k], hi[k], colour[k], index)


@lru_cache(maxsize=4096)
def _sheet(kind: str, pose: str, colour: str, height: float, shade: int, dark: bool) -> Sheet:
    found = list(PARTS[kind](Thing(kind, 0, 0, pose, colour, height=height, shade=shade), dark))
    corners = np.array([(p.left, -p.high, p.right, -p.low) for p in found])[:, None]
    swing = np.array([(p.swing[0], -p.swing[1]) for p in found])[:, None]
    glows = np.array([p.glows for p in found])[:, None, None]
    colours = np.array([p.colour for p in found], float)[:, None]
    return Sheet(corners[..., :2], corners[..., 2:], swing, colours, [p.round for p in found], glows)


def _darker(colour: Colour, factor: float) -> Colour:
    red, green, blue = (int(c * factor) for c in colour)
    return red, green, blue


def _car(thing: Thing, dark: bool) -> Iterator[Part]:
    if thing.pose == "crossing":
        yield from _car_side(thing)
        return
    paint_, oncoming = COLOURS[thing.colour], thing.pose == "oncoming"
    lamp = BEAM if oncoming else (BRAKE if dark else TAIL)
    for side in (-1, 1):
        yield Part(side * 0.82 - 0.25, side * 0.82 + 0.25, 0, 0.5, RUBBER)
    yield Part(-0.86, 0.86, 0.95, 1.75, _darker(paint_, 0.88))
    yield Part(-0.68, 0.68, 1.08, 1.6, BRIGHT_GLASS if oncoming else GLASS)
    yield Part(-1.15, 1.15, 0.3, 1.08, paint_)
    for side in (-1, 1):
        yield Part(side * 0.9 - 0.2, side * 0.9 + 0.2, 0.66, 0.92, lamp, glows=dark)


def _car_side(thing: Thing) -> Iterator[Part]:
    paint_ = COLOURS[thing.colour]
    yield Part(-1.15, 1.2, 0.95, 1.75, _darker(paint_, 0.88))
    yield Part(-0.95, 1.0, 1.05, 1.6, GLASS)
    yield Part(-2.2, 2.2, 0.35, 1.1, paint_)
    for side in (-1, 1):
        yield Part(side * 1.35 - 0.4, side * 1.35 + 0.4, 0, 0.8, RUBBER, round=True)


def _truck(thing: Thing, dark: bool) -> Iterator[Part]:
    paint_, oncoming = COLOURS[thing.colour], thing.pose == "oncoming"
    for side in (-1, 1):
        yield Part(side * 0.95 - 0.3, side * 0.95 + 0.3, 0, 0.6, RUBBER)
    yield Part(-1.3, 1.3, 0.35, 0.75, METAL)
    yield Part(-1.3, 1.3, 0.75, 3.3, paint_)
    if oncoming:
        yield Part(-1.05, 1.05, 1.75, 2.75, BRIGHT_GLASS)
    else:
        yield Part(-0.09, 0.09, 0.8, 3.2, _darker(paint_, 0.55) if thing.colour != "black" else METAL)
    for side in (-1, 1):
        lamp = BEAM if oncoming else (BRAKE if dark else TAIL)
        yield Part(side * 1.05 - 0.2, side * 1.05 + 0.2, 0.42, 0.68, lamp, glows=dark)


def _pedestrian(thing: Thing, dark: bool) -> Iterator[Part]:
    moving = 0.18 if thing.pose in ("walking", "crossing") else 0.0
    for side in (-1, 1):
        yield Part(side * 0.2 - 0.17, side * 0.2 + 0.17, 0, 0.85, TROUSERS, swing=(side * moving, 0))
    yield Part(-0.42, 0.42, 0.8, 1.65, CLOTHES[thing.shade % len(CLOTHES)])
    yield Part(-0.28, 0.28, 1.6, 2.15, SKIN, round=True)


def _cyclist(thing: Thing, dark: bool) -> Iterator[Part]:
    for side in (-1, 1):
        yield Part(side * 0.6 - 0.42, side * 0.6 + 0.42, 0, 0.84, RUBBER, round=True)
        yield Part(side * 0.6 - 0.24, side * 0.6 + 0.24, 0.18, 0.66, (190, 190, 195), round=True)
    yield Part(-0.14, 0.14, 0.5, 1.0, TROUSERS, swing=(0, 0.12))
    yield Part(-0.42, 0.36, 0.95, 1.65, (150, 255, 30))
    yield Part(-0.26, 0.3, 1.6, 2.1, SKIN, round=True)
    yield Part(-0.3, 0.34, 1.85, 2.2, (0, 225, 240))


def _signal(thing: Thing, dark: bool) -> Iterator[Part]:
    yield Part(-0.12, 0.12, 0, 2.6, METAL)
    yield Part(-0.62, 0.62, 2.4, 5.0, (12, 12, 14))
    for name, low in (("red", 4.12), ("yellow", 3.32), ("green", 2.52)):
        lit = name == thing.colour
        yield Part(-0.42, 0.42, low, low + 0.8, LAMPS[name] if lit else (45, 45, 48), round=True, glows=lit)


def _sign(thing: Thing, dark: bool) -> Iterator[Part]:
    yield Part(-0.09, 0.09, 0, 2.2, METAL)
    if thing.pose == "stop":
        yield Part(-0.75, 0.75, 1.9, 3.4, (215, 15, 30), round=True)
        yield Part(-0.5, 0.5, 2.5, 2.8, (250, 250, 250))
    elif thing.pose == "limit":
        yield Part(-0.75, 0.75, 1.9, 3.4, (215, 15, 30), round=True)
        yield Part(-0.5, 0.5, 2.15, 3.15, (250, 250, 250), round=True)
    else:
        yield Part(-0.75, 0.75, 1.9, 3.4, (10, 70, 210))
        yield Part(-0.3, 0.3, 2.2, 3.1, (250, 250, 250))


def _tree(thing: Thing, dark: bool) -> Iterator[Part]:
    tall, leaves = thing.height, LEAVES[thing.shade % len(LEAVES)]
    yield Part(-0.22, 0.22, 0, 0.5 * tall, TRUNK)
    if thing.pose == "fir":
        for k, half in enumerate((1.7, 1.25, 0.7)):
            yield Part(-half, half, (0.22 + 0.24 * k) * tall, (0.5 + 0.24 * k) * tall, leaves, round=True)
    else:
        yield Part(-0.34 * tall, 0.34 * tall, 0.35 * tall, tall, leaves, round=True)


PARTS = {
    "car": _car,
    "truck": _truck,
    "pedestrian": _pedestrian,
    "cyclist": _cyclist,
    "signal": _signal,
    "sign": _sign,
    "tree": _tree,
}
DEPTH, WIDTH = 6.0, 7.0  # of a building


def _paint_building(
    canvas: Canvas, thing: Thing, index: int, eye: Pose, air: Air, x: np.ndarray, z: np.ndarray, dark: bool
) -> None:
    """A box: the wall along the road in perspective, then the front with rows of windows."""
    wall = WALLS[thing.shade % len(WALLS)]
    away = np.sign(thing.lateral)

    def face(start: float, stop: float, back: float, low: float, high: float) -> np.ndarray:
        across = x[:, None] + away * np.array([start, start, stop, stop])
        ahead = z[:, None] + np.array([0.0, 0.0, back, back])
        return project(eye, across, np.array([low, high, high, low]), ahead)

    canvas.quad(face(0, 0, DEPTH, 0, thing.height), air.on_thing(_darker(wall, 0.72), z + DEPTH / 2), index)
    canvas.quad(face(0, WIDTH, 0, 0, thing.height), air.on_thing(wall, z), index)
    glass = air.on_thing((255, 214, 110) if dark else (70, 86, 110), z, dark)
    for low in np.arange(1.2, thing.height - 1.0, 2.6):
        for start in (0.8, 4.0):
            canvas.quad(face(start, start + 2.0, 0, low, low + 1.3), glass, index)


def reach(thing: Thing, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a thing may paint: left and right in picture widths, generously, and the depth that orders it."""
    z = np.maximum(z, NEAR)
    if thing.kind == "building":
        away = np.sign(thing.lateral)
        edges = FOCAL * np.stack([x / z, (x + away * WIDTH) / z, x / np.maximum(z + DEPTH, NEAR)])
        # Ordered by its far end: whatever stands beside its long wall stands between it and the road.
        return edges.min(0) - MARGIN, edges.max(0) + MARGIN, z + DEPTH
    half = thing.height * 0.5 if thing.kind == "tree" else 2.8
    return FOCAL * (x - half) / z - MARGIN, FOCAL * (x + half) / z + MARGIN, z
