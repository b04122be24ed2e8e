"""What can be seen in a clip: decided by the pixels that the renderer shows, never by the scene graph alone.

A road user or sign is *clear* when, in at least CLEAR_FRAMES of the 8 frames at 64 by 64, it shows enough
pixels and most of itself; it is *hidden* when it never shows more than HIDDEN_PIXELS. What is neither would
make a question unfair, so scenes are built without it (``build_scene``). Scenery may come and go: it is
known, absent, or not asked about.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from specfuse.data.world.camera import FOCAL, pose, thing_in_camera
from specfuse.data.world.render import Pictures, render
from specfuse.data.world.sample import sample_scene
from specfuse.data.world.scene import FRAME_TIMES, NUM_FRAMES, SCENERY, VEHICLES, Scene
from specfuse.data.world.splits import WORLD_SEED

SIZE = 64
CLEAR_FRAMES = 6
CLEAR_SHARE = 0.7  # of its own pixels, nothing else in front
HIDDEN_PIXELS = 3
CLEAR_PIXELS = {"car": 26, "truck": 45, "pedestrian": 18, "cyclist": 20, "signal": 18, "sign": 9}
SCENERY_PIXELS = 40
OFF_CENTRE = 0.08  # picture widths
NEARER = 1.15  # how many times further away the next vehicle must be

CLEAR, DOUBTFUL, HIDDEN = "clear", "doubtful", "hidden"


@dataclass(frozen=True, slots=True)
class Seen:
    """A thing that is clearly seen."""

    index: int  # into Scene.things
    kind: str
    pose: str
    colour: str
    depths: tuple[float, ...]  # metres ahead, in each of the 8 frames
    columns: tuple[float, ...]  # picture widths right of the middle, in each of the 8 frames

    @property
    def depth(self) -> float:
        """Metres ahead in the middle of the clip."""
        return self.depths[NUM_FRAMES // 2]

    @property
    def side(self) -> str:
        """Left, middle or right of the picture in the middle of the clip."""
        column = self.columns[NUM_FRAMES // 2]
        return "left" if column < -OFF_CENTRE else "right" if column > OFF_CENTRE else "middle"

    @property
    def stays_on_one_side(self) -> bool:
        """True if it is clearly left or clearly right of the middle in every frame."""
        return max(self.columns) < -OFF_CENTRE or min(self.columns) > OFF_CENTRE


@dataclass(frozen=True, slots=True)
class View:
    """What somebody who watches the clip can know; captions and answers are written from this alone."""

    scene: Scene
    seen: tuple[Seen, ...]  # clear things, nearest first
    scenery: dict[str, bool | None]  # tree, building: there, not there, or hard to say

    def of(self, *kinds: str) -> list[Seen]:
        """Clear things of these kinds, nearest first."""
        return [thing for thing in self.seen if thing.kind in kinds]

    def nearest_vehicle(self) -> Seen | None:
        """The car or truck that is clearly nearer than all others in CLEAR_FRAMES frames, if there is one."""
        vehicles = self.of(*VEHICLES)
        if not vehicles:
            return None
        first, others = vehicles[0], vehicles[1:]
        depths = np.array([vehicle.depths for vehicle in others]).reshape(len(others), NUM_FRAMES)
        nearer = (depths > NEARER * np.array(first.depths)).all(0)
        return first if nearer.sum() >= CLEAR_FRAMES else None


def verdict(kind: str, visible: np.ndarray, drawn: np.ndarray) -> str:
    """Clear, doubtful or hidden, from a thing's pixels ``[8]`` seen, and ``[8]`` with nothing in front."""
    if visible.max(initial=0) <= HIDDEN_PIXELS:
        return HIDDEN
    good = (visible >= CLEAR_PIXELS[kind]) & (visible >= CLEAR_SHARE * drawn)
    return CLEAR if good.sum() >= CLEAR_FRAMES else DOUBTFUL


def survey(scene: Scene) -> Pictures:
    """Visible and drawn pixels of every thing in the 8 frames at 64 by 64, without colours."""
    return render(scene, FRAME_TIMES, SIZE, colour=False)


@lru_cache(maxsize=32)
def build_scene(clip: int, world_seed: int = WORLD_SEED) -> tuple[Scene, View]:
    """The scene of a clip without doubtful things, and the view of it.

    Raises:
        IndexError: there is no such clip.
    """
    scene = sample_scene(clip, world_seed)
    while True:
        pictures = survey(scene)
        verdicts = [
            CLEAR if thing.kind in SCENERY else verdict(thing.kind, pictures.visible[i], pictures.drawn[i])
            for i, thing in enumerate(scene.things)
        ]
        # Taking one away may uncover another; every round takes at least one, so this ends.
        if DOUBTFUL not in verdicts:
            return scene, _view(scene, verdicts, pictures.visible)
        kept = (thing for thing, v in zip(scene.things, verdicts, strict=True) if v != DOUBTFUL)
        scene = replace(scene, things=tuple(kept))


def _view(scene: Scene, verdicts: list[str], visible: np.ndarray) -> View:
    eye = pose(scene, FRAME_TIMES)
    seen = []
    for i, thing in enumerate(scene.things):
        if thing.kind not in SCENERY and verdicts[i] == CLEAR:
            x, z = thing_in_camera(scene, thing, eye, FRAME_TIMES)
            columns, depths = tuple((FOCAL * x / z).tolist()), tuple(z.tolist())
            seen.append(Seen(i, thing.kind, thing.pose, thing.colour, depths, columns))
    scenery = {kind: _scenery(visible[scene.of_kind(kind)].sum(0)) for kind in SCENERY}
    return View(scene, tuple(sorted(seen, key=lambda s: s.depth)), scenery)


def _scenery(pixels: np.ndarray) -> bool | None:
    if pixels.max() <= HIDDEN_PIXELS:
        return False
    return True if (pixels >= SCENERY_PIXELS).sum() >= CLEAR_FRAMES else None
