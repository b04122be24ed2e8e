"""Sky, hills and ground: what lies behind all things, evaluated for every pixel."""

from __future__ import annotations

import numpy as np

from specfuse.data.world.camera import EYE_HEIGHT, FOCAL, HORIZON, Pose, to_road
from specfuse.data.world.light import Air
from specfuse.data.world.scene import LANE_WIDTH, Scene, generator

ASPHALT = (88, 88, 94)
PAINT = (240, 240, 240)
YELLOW = (245, 200, 40)
PAVEMENT = (165, 160, 152)
BESIDE = {
    "country": (86, 150, 52),
    "curve": (86, 150, 52),
    "junction": (150, 128, 104),
    "city": (150, 128, 104),
    "highway": (196, 178, 120),
}
SNOW = (232, 236, 244)
ROAD_HALF = 1.5 * LANE_WIDTH
STREET_HALF = 4.0  # of a crossing street
BAND = 6.0  # metres; verges are lighter and darker by turns, which shows the ego motion


def backdrop(scene: Scene, eye: Pose, air: Air, size: int) -> np.ndarray:
    """Background pictures, float32 ``[T, size, size, 3]``."""
    pixel = (np.arange(size) + 0.5) / size
    u = (pixel[None, :] - 0.5).astype(np.float32)
    v = (pixel[:, None] - HORIZON - eye.bounce[:, None, None]).astype(np.float32)
    cos, sin = np.float32(np.cos(eye.roll)), np.float32(np.sin(eye.roll))
    u, v = u * cos + v * sin, v * cos - u * sin  # [T, size, size], as if the camera stood upright
    up = np.clip(v * np.float32(-1 / HORIZON), 0, 1)[..., None]
    picture = air.horizon.astype(np.float32) + up * (air.top - air.horizon).astype(np.float32)
    _hills(picture, scene, eye, air, u, v)
    low = int(np.argmax((v > -1 / size).any((0, 2))))
    cover = np.clip(v[:, low:] * size + 0.5, 0, 1)[..., None].astype(np.float32)
    ground = _ground(scene, eye, air, u[:, low:], np.maximum(v[:, low:], np.float32(0.5 / size)), size)
    picture[:, low:] += cover * (ground - picture[:, low:])
    return picture


def _hills(picture: np.ndarray, scene: Scene, eye: Pose, air: Air, u: np.ndarray, v: np.ndarray) -> None:
    if scene.weather == "fog":
        return
    size = picture.shape[1]
    rows = slice(int(np.argmax((v > -0.14).any((0, 2)))), int((HORIZON + 0.06) * size) + 1)
    phase = generator(scene.look, 2).uniform(0, 2 * np.pi, size=3)
    bearing = eye.yaw[:, None, None] + np.arctan(u[:, rows] / FOCAL)
    waves = zip((7.0, 13.0, 19.0), (0.030, 0.022, 0.012), phase, strict=True)
    height = 0.055 + sum(size_ * np.sin(rate * bearing + start) for rate, size_, start in waves)
    cover = np.clip((v[:, rows] + height) * size + 0.5, 0, 1)[..., None].astype(np.float32)
    colour = SNOW if scene.weather == "snow" else (70, 92, 96)
    lit = (0.45 * air.horizon + 0.55 * np.asarray(colour) * air.ground * 0.8).astype(np.float32)
    picture[:, rows] += cover * (lit - picture[:, rows])


def _ground(scene: Scene, eye: Pose, air: Air, u: np.ndarray, v: np.ndarray, size: int) -> np.ndarray:
    """Colour ``[T, h, w, 3]`` of the ground seen at upright picture coordinates."""
    depth = FOCAL * EYE_HEIGHT / v
    side = u / FOCAL * depth
    cos, sin = (f(eye.yaw)[:, None, None] for f in (np.cos, np.sin))
    x = side * cos + depth * sin + eye.x[:, None, None]
    z = depth * cos - side * sin + eye.z[:, None, None]
    s, lateral = (a.astype(np.float32) for a in to_road(scene, x, z))
    # Metres that one pixel spans across and along: edges are blurred over as much.
    across = (depth / (FOCAL * size)).astype(np.float32)
    along = (depth * across / EYE_HEIGHT).astype(np.float32)
    colour = _verge(scene, s, lateral, across, along)
    _road(colour, scene, s, lateral, across, along)
    clear = np.exp(-air.haze * depth).astype(np.float32)[..., None]
    colour *= (air.ground * clear).astype(np.float32)
    colour += (air.horizon * (1 - clear)).astype(np.float32)
    return colour


def _verge(
    scene: Scene, s: np.ndarray, lateral: np.ndarray, across: np.ndarray, along: np.ndarray
) -> np.ndarray:
    base = np.asarray(SNOW if scene.weather == "snow" else BESIDE[scene.road], np.float32)
    wave = np.sin(s * np.float32(2 * np.pi / BAND)) * (0.13 * np.exp(-((along / 2.5) ** 2)))
    colour = np.minimum(base * (1 + wave[..., None]), 255)
    if scene.road in ("city", "junction"):
        _lay(colour, _strip(np.abs(lateral), ROAD_HALF + 1.1, 1.1, across), PAVEMENT)
    return colour


def _road(
    colour: np.ndarray,
    scene: Scene,
    s: np.ndarray,
    lateral: np.ndarray,
    across: np.ndarray,
    along: np.ndarray,
) -> None:
    _lay(colour, _strip(lateral, 0, ROAD_HALF, across), ASPHALT)
    middle = PAINT if scene.road == "highway" else YELLOW
    open_road = np.ones_like(s)
    if scene.road == "junction":
        open_road = 1 - _strip(s, scene.junction, STREET_HALF, along)
        _lay(colour, 1 - open_road, ASPHALT)
        zebra = _strip(s, scene.junction - STREET_HALF - 1.4, 0.9, along) * _strip(
            lateral, 0, ROAD_HALF, across
        )
        _lay(colour, zebra * _dashes(lateral, 1.5, across), PAINT)
        open_road = open_road * _strip(s, scene.junction - STREET_HALF - 52.3, 50, along)
    _lay(colour, _strip(np.abs(lateral), ROAD_HALF - 0.3, 0.13, across) * open_road, PAINT)
    _lay(colour, _strip(lateral, -LANE_WIDTH / 2, 0.14, across) * open_road, middle)
    dash = _dashes(s, 4.0, along) * open_road
    _lay(colour, _strip(lateral, LANE_WIDTH / 2, 0.14, across) * dash, PAINT)


def _strip(where: np.ndarray, middle: float, half: float, pixel: np.ndarray) -> np.ndarray:
    """Covered share of pixels that are ``pixel`` metres wide, of a strip of the ground."""
    inside = (half - np.abs(where - np.float32(middle))) / pixel + 0.5
    return np.clip(inside, 0, np.minimum(1, 2 * half / pixel))


def _dashes(where: np.ndarray, period: float, pixel: np.ndarray) -> np.ndarray:
    """Covered share under dashes half as long as their period; one half where pixels are longer than that."""
    phase = np.abs((where / np.float32(period)) % 1 - 0.5)
    sharp = np.clip((0.25 - phase) * period / pixel + 0.5, 0, 1)
    return np.where(pixel > period / 2, np.float32(0.5), sharp)


def _lay(colour: np.ndarray, cover: np.ndarray, paint: tuple[int, int, int]) -> None:
    colour += cover[..., None] * (np.asarray(paint, np.float32) - colour)
