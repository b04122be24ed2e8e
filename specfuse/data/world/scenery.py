"""Trees and buildings along the road: they are passed by, and show where a town ends."""

from __future__ import annotations

import numpy as np

from specfuse.data.world.scene import Scene, Thing

REACH = 60.0  # metres of road furnished ahead
TREE_ODDS = {"country": 0.65, "curve": 0.7, "junction": 0.35, "city": 0.3, "highway": 0.3}
BUILDING_ODDS = {"country": 0.3, "curve": 0.1, "junction": 0.75, "city": 1.0, "highway": 0.05}
PLOT = 9.0  # metres of road per building


def sample(rng: np.random.Generator, scene: Scene, along: float) -> list[Thing]:
    """Scenery of one clip; ``along``: metres driven since the first clip of the drive."""
    trees = rng.uniform() < TREE_ODDS[scene.road]
    buildings = rng.uniform() < BUILDING_ODDS[scene.road]
    things: list[Thing] = []
    fir = bool(rng.uniform() < 0.4)
    for side in (-1, 1):
        offset = rng.uniform(0, 9) - along
        if buildings and (scene.road in ("city", "junction") or side > 0):
            things += _row(rng, scene, side, offset)
        if trees:
            things += _avenue(rng, side, offset, fir, near=7.2 if buildings else 7.6)
    return [thing for thing in things if -8 < thing.s < REACH and not _in_crossing(scene, thing)]


def _row(rng: np.random.Generator, scene: Scene, side: int, offset: float) -> list[Thing]:
    dense = 1 if scene.road == "city" else 2
    count = int((REACH + 40) / PLOT)
    height, shade, skip = rng.uniform(5.5, 10, count), rng.integers(4, size=count), rng.uniform(size=count)
    return [
        Thing(
            "building",
            offset % PLOT + (k - 3) * PLOT,
            side * 8.6,
            height=float(height[k]),
            shade=int(shade[k]),
        )
        for k in range(count)
        if k % dense == 0 or skip[k] < 0.4
    ]


def _avenue(rng: np.random.Generator, side: int, offset: float, fir: bool, near: float) -> list[Thing]:
    count = 10
    height, shade = rng.uniform(3.6, 6.0, count), rng.integers(3, size=count)
    gap = 7.0
    return [
        Thing(
            "tree",
            offset % gap + (k - 1) * gap,
            side * near,
            "fir" if fir else "round",
            height=float(height[k]),
            shade=int(shade[k]),
        )
        for k in range(count)
    ]


def _in_crossing(scene: Scene, thing: Thing) -> bool:
    if scene.road != "junction":
        return False
    length = 6.0 if thing.kind == "building" else 0.0
    return scene.junction - 5.0 - length < thing.s < scene.junction + 5.0
