"""Weather and time of day as colours: sky, tint of what is lit, haze, and what falls from the sky."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from specfuse.data.world.camera import Pose
from specfuse.data.world.scene import Scene, generator

# (light, weather): colour at the top of the picture, colour at the horizon.
SKY = {
    ("day", "clear"): ((60, 135, 240), (180, 215, 250)),
    ("day", "rain"): ((95, 105, 116), (135, 143, 152)),
    ("day", "fog"): ((200, 204, 208), (206, 209, 212)),
    ("day", "snow"): ((186, 196, 210), (222, 227, 234)),
    ("dusk", "clear"): ((95, 60, 135), (255, 140, 55)),
    ("dusk", "rain"): ((84, 62, 84), (178, 104, 70)),
    ("dusk", "fog"): ((196, 152, 128), (212, 160, 130)),
    ("dusk", "snow"): ((148, 116, 142), (240, 166, 122)),
    ("night", "clear"): ((6, 8, 38), (24, 28, 76)),
    ("night", "rain"): ((12, 14, 22), (27, 29, 38)),
    ("night", "fog"): ((60, 64, 76), (68, 72, 84)),
    ("night", "snow"): ((26, 30, 52), (56, 62, 88)),
}
THINGS = {"day": (1.0, 1.0, 1.0), "dusk": (0.86, 0.72, 0.64), "night": (0.66, 0.67, 0.76)}
GROUND = {"day": (1.0, 1.0, 1.0), "dusk": (0.72, 0.56, 0.50), "night": (0.30, 0.32, 0.44)}
HAZE = {"clear": 0.003, "rain": 0.012, "fog": 0.036, "snow": 0.014}  # 1/m


class Air(NamedTuple):
    """What lies between a surface and the camera; colours are float ``[3]``, 0 to 255."""

    top: np.ndarray
    horizon: np.ndarray
    things: np.ndarray  # factor on the colour of things
    ground: np.ndarray  # factor on the colour of the ground
    haze: float

    def on_thing(self, colour: object, depth: np.ndarray, glows: bool = False) -> np.ndarray:
        """Colour ``[T, 3]`` of a surface at ``depth`` metres; what glows needs no other light."""
        lit = np.asarray(colour, np.float64) * (1.0 if glows else self.things)
        clear = np.exp(-self.haze * (0.5 if glows else 1.0) * depth)[..., None]
        return self.horizon + clear * (lit - self.horizon)


def air(scene: Scene) -> Air:
    """The air of a scene."""
    top, horizon = (np.asarray(colour, float) for colour in SKY[scene.light, scene.weather])
    wet = 0.8 if scene.weather == "rain" else 1.0
    ground = np.asarray(GROUND[scene.light]) * wet
    return Air(top, horizon, np.asarray(THINGS[scene.light]), ground, HAZE[scene.weather])


def sun(scene: Scene, eye: Pose) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]] | None:
    """Corners ``[T, 2]`` and colour of sun or moon in picture coordinates; None behind clouds."""
    if scene.weather != "clear":
        return None
    bearing = generator(scene.look).uniform(-0.4, 0.4)
    x = 0.5 + 0.75 * np.tan(bearing - eye.yaw)
    y, radius, colour = {
        "day": (0.10, 0.055, (255, 245, 170)),
        "dusk": (0.27, 0.085, (255, 215, 110)),
        "night": (0.11, 0.045, (235, 238, 250)),
    }[scene.light]
    middle = np.stack([x, y + eye.bounce], -1)
    return middle - radius, middle + radius, colour


def falling(scene: Scene, times: np.ndarray, rgb: np.ndarray) -> None:
    """Paints rain or snow over ``rgb`` ``[T, size, size, 3]``; drops enter again at the top."""
    if scene.weather == "rain":
        count, speed, slant, radius, alpha, colour = 34, 2.6, 0.12, (0.010, 0.055), 0.4, (205, 215, 235)
    elif scene.weather == "snow":
        count, speed, slant, radius, alpha, colour = 56, 0.45, 0.05, (0.014, 0.014), 0.95, (255, 255, 255)
    else:
        return
    rng = generator(scene.look, 1)
    start = rng.uniform(size=(count, 2))
    pace = rng.uniform(0.8, 1.2, size=count) * speed
    y = (start[:, 1] + pace * times[:, None]) % 1.2 - 0.1
    x = (start[:, 0] + slant * y) % 1.0
    cover = _drops(np.stack([x, y], -1), radius, rgb.shape[1])[..., None] * alpha
    lit = np.asarray(colour) * (0.65 if scene.light == "night" else 1.0)
    rgb += cover * (lit.astype(np.float32) - rgb)


def _drops(centre: np.ndarray, radius: tuple[float, float], size: int) -> np.ndarray:
    """Largest cover ``[T, size, size]`` of upright ellipses at ``centre`` ``[T, P, 2]``."""
    rx, ry = (max(r * size, 0.4) for r in radius)
    wide, tall = np.arange(-int(rx) - 1, int(rx) + 2), np.arange(-int(ry) - 1, int(ry) + 2)
    middle = centre * size
    px = np.floor(middle[..., 0])[..., None, None].astype(int) + wide
    py = np.floor(middle[..., 1])[..., None, None].astype(int) + tall[:, None]
    dx = (px + 0.5 - middle[..., 0, None, None]) / rx
    dy = (py + 0.5 - middle[..., 1, None, None]) / ry
    cover = np.clip((1 - np.sqrt(dx * dx + dy * dy)) * min(rx, ry) + 0.5, 0, 1).astype(np.float32)
    frame = np.arange(len(centre))[:, None, None, None]
    inside = (px >= 0) & (px < size) & (py >= 0) & (py < size)
    out = np.zeros((len(centre), size, size), np.float32)
    np.maximum.at(out.reshape(-1), ((frame * size + py) * size + px)[inside], cover[inside])
    return out
