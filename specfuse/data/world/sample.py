"""Scenes from seeds.

A drive fixes place, weather, light and who is on the road; a clip varies it a little.
Draws come from ``SeedSequence([world_seed, clip])`` or ``[world_seed, 1, drive]``: any clip can be made
alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from specfuse.data.world import scenery
from specfuse.data.world.camera import FOCAL
from specfuse.data.world.scene import COLOURS, EGO_SPEEDS, LANE_WIDTH, VEHICLES, Ego, Scene, Thing, generator
from specfuse.data.world.splits import WORLD_SEED, drive_of, drives

ROAD_ODDS = {"country": 0.14, "curve": 0.30, "junction": 0.26, "city": 0.16, "highway": 0.14}
WEATHER_ODDS = {"clear": 0.34, "rain": 0.24, "fog": 0.20, "snow": 0.22}
LIGHT_ODDS = {"day": 0.40, "dusk": 0.29, "night": 0.31}
PACE_ODDS = {
    "country": {"standing": 0.20, "slow": 0.30, "fast": 0.50},
    "curve": {"slow": 0.35, "fast": 0.65},
    "junction": {"standing": 0.30, "slow": 0.70},
    "city": {"standing": 0.40, "slow": 0.35, "fast": 0.25},
    "highway": {"slow": 0.25, "fast": 0.75},
}
SIGNAL_ODDS = {"country": 0.25, "curve": 0.0, "junction": 0.95, "city": 0.8, "highway": 0.0}
SIGN_ODDS = {"country": 0.5, "curve": 0.5, "junction": 0.45, "city": 0.5, "highway": 0.4}
CURVE_RADIUS = 24.0
TURN_RATE = 0.30  # rad/s, at a junction
_HALF = 0.5  # seconds: things are placed where they are in the middle of a clip


@dataclass(frozen=True)
class Actor:
    """Somebody who may be in a clip; ``depth`` is metres ahead of the camera in the middle of the clip."""

    kind: str
    pose: str
    depth: float
    lateral: float
    colour: str = ""
    pace: float = 0.0  # own speed along the road; of a car ahead: relative to the ego car
    drift: float = 0.0
    shade: int = 0


def draw(rng: np.random.Generator, odds: dict[str, float]) -> str:
    """One key, with probability proportional to its value."""
    weight = np.array(list(odds.values()))
    return str(rng.choice(list(odds), p=weight / weight.sum()))


def sample_scene(clip: int, world_seed: int = WORLD_SEED) -> Scene:
    """The scene of a clip, before anything is removed that is neither clearly seen nor clearly hidden.

    Raises:
        IndexError: there is no such clip.
    """
    drive = drive_of(clip, world_seed)
    place = generator(world_seed, 1, drive)
    rng = generator(world_seed, clip)
    base = _drive(place)
    step = clip - int(drives(world_seed).first[drive])
    ego = _ego(rng, base)
    scene = Scene(
        clip=clip,
        drive=drive,
        road=base.road,
        weather=base.weather,
        light=base.light,
        ego=ego,
        things=(),
        curvature=base.bend / CURVE_RADIUS if base.road == "curve" else 0.0,
        junction=11.0 + ego.speed * _HALF if base.road == "junction" else 0.0,
        look=base.look,
    )
    things = [*_traffic(rng, scene, base), *_roadside(rng, scene, base, place)]
    things += scenery.sample(generator(base.look, 3), scene, along=step * ego.speed)
    return replace(scene, things=tuple(things))


@dataclass(frozen=True)
class _Drive:
    """What the clips of a drive have in common; of the cast, each clip takes some."""

    road: str
    weather: str
    light: str
    bend: float  # which way a curve goes, right positive
    pace: str
    signal: bool
    cast: dict[str, list[Actor]]
    counts: dict[str, int]  # how many of each kind of actor a clip has, more or less
    look: int


def _drive(place: np.random.Generator) -> _Drive:
    road, weather, light = (draw(place, odds) for odds in (ROAD_ODDS, WEATHER_ODDS, LIGHT_ODDS))
    sizes = {"cyclist": 4, "truck": 3, "pedestrian": 12, "car": 18}
    return _Drive(
        road=road,
        weather=weather,
        light=light,
        bend=float(place.choice([-1, 1])),
        pace=draw(place, PACE_ODDS[road]),
        signal=bool(place.uniform() < SIGNAL_ODDS[road]),
        cast={kind: [_actor(place, road, light, kind) for _ in range(n)] for kind, n in sizes.items()},
        counts={
            "cyclist": int(place.uniform() < 0.6),
            "truck": int(place.uniform() < 0.45),
            "pedestrian": int(place.integers(0, 5)),
            "car": int(place.choice(7, p=[0.1, 0.15, 0.2, 0.2, 0.15, 0.1, 0.1])),
        },
        look=int(place.integers(2**31)),
    )


def _ego(rng: np.random.Generator, base: _Drive) -> Ego:
    pace = base.pace if rng.uniform() < 0.75 else draw(rng, PACE_ODDS[base.road])
    speed = EGO_SPEEDS[pace]
    if base.road == "curve":
        return Ego(pace, "right" if base.bend > 0 else "left", speed, base.bend * speed / CURVE_RADIUS)
    if base.road == "junction" and pace != "standing" and rng.uniform() < 0.8:
        side = float(rng.choice([-1, 1]))
        return Ego(pace, "right" if side > 0 else "left", speed, side * TURN_RATE)
    return Ego(pace, "straight", speed, 0.0)


def _actor(rng: np.random.Generator, road: str, light: str, kind: str) -> Actor:
    shade = int(rng.integers(12))
    if kind == "pedestrian":
        if rng.uniform() < 0.35:
            drift = float(rng.choice([-1.2, 1.2]))
            return Actor(
                kind, "crossing", rng.uniform(5.5, 9), rng.uniform(-2.4, 2.4), drift=drift, shade=shade
            )
        side = float(rng.choice([-1, 1]))
        pose = str(rng.choice(["walking", "standing"]))
        pace = float(rng.choice([-0.7, 0.7])) if pose == "walking" else 0.0
        return Actor(kind, pose, rng.uniform(7.5, 11), side * rng.uniform(4.2, 5.2), pace=pace, shade=shade)
    if kind == "cyclist":
        return Actor(
            kind, "ahead", rng.uniform(6.5, 10), rng.uniform(2.2, 4.2) * rng.choice([-1, 1]), pace=0.3
        )
    colour = str(rng.choice([c for c in COLOURS if c != "black" or light != "night"]))
    depth = rng.uniform(6, 14) if kind == "car" else rng.uniform(8, 14)
    if road == "junction" and kind == "car" and rng.uniform() < 0.25:
        drift = float(rng.choice([-1.8, 1.8]))
        return Actor(kind, "crossing", rng.uniform(9.5, 12), rng.uniform(-3, 3), colour, drift=drift)
    lane = int(rng.integers(-1, 2))
    relative = float(rng.uniform(-0.8, 0.8))
    if road == "highway" or lane == 0:
        return Actor(kind, "ahead", depth, lane * LANE_WIDTH, colour, pace=relative)
    if lane < 0:
        return Actor(kind, "oncoming", depth, -LANE_WIDTH, colour, pace=-2.0)
    return Actor(kind, "parked", depth, LANE_WIDTH + 0.2, colour)


def _traffic(rng: np.random.Generator, scene: Scene, base: _Drive) -> list[Thing]:
    """Who of the drive's cast is in this clip: those that stand apart, and some that are hidden."""
    counts = dict(base.counts)
    counts["car"] = int(np.clip(counts["car"] + rng.integers(-1, 2), 0, 6))
    counts["pedestrian"] = int(np.clip(counts["pedestrian"] + rng.integers(-1, 2), 0, 4))
    if scene.road == "highway":
        counts |= {"pedestrian": 0, "cyclist": 0}
    placed: list[Actor] = []
    for kind, cast in base.cast.items():
        left = counts[kind]
        for actor in cast:
            if left == 0 or rng.uniform() < 0.1:
                continue
            moved = replace(
                actor, depth=actor.depth + rng.normal(0, 0.5), lateral=actor.lateral + rng.normal(0, 0.1)
            )
            if moved.pose == "crossing" and moved.kind == "pedestrian" and scene.ego.pace == "fast":
                continue
            if all(_apart(moved, other) for other in placed):
                placed.append(moved)
                left -= 1
    vehicles = [actor for actor in placed if actor.kind in VEHICLES]
    unseen = [hidden for actor in vehicles if (hidden := _behind(rng, scene, actor))]
    if rng.uniform() < 0.25:
        # Too far away to be seen.
        unseen.append(Actor("car", "ahead", 95.0, float(rng.choice([-1, 0])) * LANE_WIDTH, "red"))
    return [_thing(scene, actor) for actor in placed + unseen]


def _span(actor: Actor) -> tuple[float, float]:
    half = {"car": 1.27, "truck": 1.45, "pedestrian": 0.6, "cyclist": 1.3}[actor.kind]
    half = 2.45 if actor.kind == "car" and actor.pose == "crossing" else half
    return FOCAL * (actor.lateral - half) / actor.depth, FOCAL * (actor.lateral + half) / actor.depth


def _apart(a: Actor, b: Actor) -> bool:
    """True if the two leave a gap between them in the middle picture, or overlap only a little."""
    (a0, a1), (b0, b1) = _span(a), _span(b)
    overlap = min(a1, b1) - max(a0, b0)
    return overlap < 0.26 * min(a1 - a0, b1 - b0) and abs(a.depth - b.depth) > 0.3


def _behind(rng: np.random.Generator, scene: Scene, front: Actor) -> Actor | None:
    """Somebody hidden by ``front`` for the whole clip, so that what exists and what is seen differ."""
    if rng.uniform() > 0.3 or scene.road == "curve" or (scene.road == "highway" and front.kind == "car"):
        return None
    further = 1.25
    kind = "car" if front.kind == "truck" else "pedestrian"
    if kind == "pedestrian" and front.kind == "car":
        further = 1.9  # a person is taller than a car: only far behind it is the whole person covered
    return replace(
        front,
        kind=kind,
        depth=front.depth * further,
        lateral=front.lateral * further,
        drift=front.drift * further,
        colour="blue" if kind == "car" else "",
        shade=1,
    )


def _thing(scene: Scene, actor: Actor) -> Thing:
    with_ego = actor.pose == "ahead"
    speed = actor.pace
    # Where the ego car will be in the middle of the clip, for what does not travel with it.
    start = actor.depth - speed * _HALF + (0.0 if with_ego else scene.ego.speed * _HALF)
    lateral = actor.lateral - actor.drift * _HALF
    return Thing(
        actor.kind, start, lateral, actor.pose, actor.colour, speed, actor.drift, with_ego, shade=actor.shade
    )


def _roadside(
    rng: np.random.Generator, scene: Scene, base: _Drive, place: np.random.Generator
) -> list[Thing]:
    things = []
    ahead = scene.ego.speed * _HALF
    if base.signal:
        odds = (
            {"red": 0.75, "yellow": 0.25}
            if scene.ego.pace == "standing"
            else {"green": 0.62, "yellow": 0.2, "red": 0.18}
        )
        side = 1 if place.uniform() < 0.4 else -1
        things.append(Thing("signal", place.uniform(10.5, 12.5) + ahead, side * 4.7, colour=draw(rng, odds)))
    if place.uniform() < SIGN_ODDS[scene.road]:
        pose = str(
            place.choice(["limit", "crossing"] if scene.road == "highway" else ["stop", "limit", "crossing"])
        )
        side = -1 if things and things[0].lateral > 0 else 1
        things.append(Thing("sign", place.uniform(10.0, 11.5) + ahead, side * 4.8, pose))
    return things
