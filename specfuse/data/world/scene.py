"""The scene graph of the driving world: what there is, where, how it moves. Metres, seconds, radians.

Road coordinates: ``s`` runs along the road, ``lateral`` across it, right positive; the ego car starts at
``s = 0, lateral = 0``, in the middle lane of three. A clip lasts one second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROADS = ("country", "curve", "junction", "city", "highway")
WEATHERS = ("clear", "rain", "fog", "snow")
LIGHTS = ("day", "dusk", "night")
TURNS = ("left", "straight", "right")
SIGNALS = ("red", "yellow", "green")

# Speeds are those of a model railway: at 8 frames a second lane dashes must move less than half their period.
EGO_SPEEDS = {"standing": 0.0, "slow": 2.5, "fast": 6.5}

VEHICLES = ("car", "truck")
ROAD_USERS = (*VEHICLES, "pedestrian", "cyclist")
FURNITURE = ("signal", "sign")
SCENERY = ("tree", "building")

# Saturated and far apart, so that a colour is still itself at night and in fog.
COLOURS = {
    "red": (225, 25, 30),
    "blue": (25, 60, 235),
    "green": (20, 165, 50),
    "yellow": (250, 215, 20),
    "white": (245, 245, 245),
    "black": (18, 18, 22),
}

LANE_WIDTH = 3.0
CLIP_SECONDS = 1.0
NUM_FRAMES = 8
FRAME_TIMES = np.arange(NUM_FRAMES) * (CLIP_SECONDS / NUM_FRAMES)


def generator(*key: int) -> np.random.Generator:
    """The random numbers that belong to a key; PCG64 by name, because a library's default may change."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. ``with_ego``: its coordinates are relative to the moving ego car."""

    kind: str  # car, truck, pedestrian, cyclist, signal, sign, tree, building
    s: float  # metres ahead at t = 0
    lateral: float
    pose: str = ""  # ahead, oncoming, parked, crossing, walking, standing; a sign's kind; a tree's shape
    colour: str = ""  # of a vehicle; of a signal: its lit lamp
    speed: float = 0.0  # along the road, m/s
    drift: float = 0.0  # across the road, m/s
    with_ego: bool = False
    height: float = 0.0  # of scenery, metres
    shade: int = 0  # picks among clothes, walls and leaves


@dataclass(frozen=True, slots=True)
class Ego:
    """The car that carries the camera."""

    pace: str  # a key of EGO_SPEEDS
    turn: str  # one of TURNS
    speed: float  # m/s
    yaw_rate: float  # rad/s, right positive


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything a frame, an event or a sentence of one clip is made from."""

    clip: int
    drive: int
    road: str
    weather: str
    light: str
    ego: Ego
    things: tuple[Thing, ...]
    curvature: float  # 1/m, right positive; 0 unless the road is a curve
    junction: float  # s of the crossing street's middle; only of a junction
    look: int  # seed of what nobody is asked about: hills, sun, rain drops

    def of_kind(self, *kinds: str) -> list[int]:
        """Indices of the things of these kinds, in the order of ``things``."""
        return [i for i, thing in enumerate(self.things) if thing.kind in kinds]
