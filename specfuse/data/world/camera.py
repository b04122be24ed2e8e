"""The ego car's camera: where it stands at time t, and where a point of the world falls in its picture.

Camera coordinates: x right, z ahead, height up from the ground. Picture coordinates: 0 to 1, right and down.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from specfuse.data.world.scene import Scene, Thing

FOCAL = 0.75  # in picture widths: a view of 67 degrees
HORIZON = 0.42
EYE_HEIGHT = 1.7
NEAR = 0.8  # nothing is drawn nearer
ROLL = 0.07  # how far the body leans in a turn
# Springs and engine: what stands still in the picture trembles a little, or an event camera would not see it.
BOUNCE, IDLING, BOUNCES_PER_SECOND = 0.008, 0.003, 2.6


class Pose(NamedTuple):
    """The camera at T times, each field ``[T]``."""

    x: np.ndarray
    z: np.ndarray
    yaw: np.ndarray  # right positive
    bounce: np.ndarray  # by how much the picture is shifted down, in picture heights
    roll: float


def pose(scene: Scene, times: np.ndarray) -> Pose:
    """Drives the ego car along a circle (or straight) at constant speed."""
    speed, rate = scene.ego.speed, scene.ego.yaw_rate
    roll = ROLL * float(np.sign(rate))
    yaw = rate * times
    phase = (scene.look % 1000) / 1000 + scene.clip * 0.37
    bounce = (BOUNCE if speed else IDLING) * np.sin(2 * np.pi * (BOUNCES_PER_SECOND * times + phase))
    if rate == 0:
        return Pose(np.zeros_like(times), speed * times, yaw, bounce, roll)
    radius = speed / rate
    return Pose(radius * (1 - np.cos(yaw)), radius * np.sin(yaw), yaw, bounce, roll)


def on_road(scene: Scene, s: np.ndarray, lateral: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World (x, z) of road coordinates: a straight line or an arc that starts at the origin."""
    if scene.curvature == 0:
        return lateral, s
    radius = 1 / scene.curvature
    return radius + (lateral - radius) * np.cos(s / radius), -(lateral - radius) * np.sin(s / radius)


def to_road(scene: Scene, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Road coordinates (s, lateral) of world points; the inverse of ``on_road``."""
    if scene.curvature == 0:
        return z, x
    radius = 1 / scene.curvature
    away = np.hypot(x - radius, z) * np.sign(radius)
    return radius * np.arctan2(z * np.sign(radius), (radius - x) * np.sign(radius)), radius - away


def to_camera(eye: Pose, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Camera (x, z) of world points; ``eye`` fields broadcast against them."""
    dx, dz = x - eye.x, z - eye.z
    cos, sin = np.cos(eye.yaw), np.sin(eye.yaw)
    return dx * cos - dz * sin, dx * sin + dz * cos


def thing_in_camera(
    scene: Scene, thing: Thing, eye: Pose, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Camera (x, z) of a thing's foot at T times, each ``[T]``."""
    s = thing.s + thing.speed * times
    lateral = thing.lateral + thing.drift * times
    x, z = on_road(scene, s, lateral)
    return (x, z) if thing.with_ego else to_camera(eye, x, z)


def project(eye: Pose, x: np.ndarray, height: np.ndarray | float, z: np.ndarray) -> np.ndarray:
    """Picture coordinates ``[T, ..., 2]`` of camera points ``[T, ...]``, none nearer than NEAR."""
    z = np.maximum(z, NEAR)
    u, v = FOCAL * x / z, FOCAL * (EYE_HEIGHT - height) / z
    cos, sin = np.cos(eye.roll), np.sin(eye.roll)
    horizon = HORIZON + eye.bounce.reshape(-1, *[1] * (z.ndim - 1))
    return np.stack([0.5 + u * cos - v * sin, horizon + u * sin + v * cos], axis=-1)
