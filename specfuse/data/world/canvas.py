"""A stack of T pictures that shapes are painted on, back to front, with analytic anti-aliasing.

The covered share of a pixel is computed, not sampled: it changes smoothly while a shape moves, as the light
on a pixel of an event camera does, where supersampling would jump. Exact for upright rectangles.
"""

from __future__ import annotations

import numpy as np


class Canvas:
    """``[T, size, size]`` pixels: colour, and which thing owns each pixel (-1: none).

    Args:
        rgb: the background, float32 ``[T, size, size, 3]``; None to keep owners only, in half the time.
        frames: T.
        size: pixels along a side.
        things: how many things there are.
    """

    def __init__(self, rgb: np.ndarray | None, frames: int, size: int, things: int):
        self.rgb = rgb
        self.size = size
        self.owner = np.full((frames, size, size), -1, dtype=np.int16)
        self.drawn = np.zeros((things, frames), dtype=np.int64)
        self._pixels = np.arange(size, dtype=np.float32)

    def rectangle(self, lo: np.ndarray, hi: np.ndarray, colour: np.ndarray, thing: int) -> None:
        """Upright rectangles between corners ``lo`` and ``hi`` ``[T, 2]`` in picture coordinates."""
        lo, hi = lo * self.size, hi * self.size
        box = self._box(lo.min(0), hi.max(0))
        if box is None:
            return
        x0, x1, y0, y1 = box
        px, py = self._pixels[x0:x1], self._pixels[y0:y1]
        across = np.minimum(px + 1, hi[:, :1]) - np.maximum(px, lo[:, :1])
        down = np.minimum(py + 1, hi[:, 1:]) - np.maximum(py, lo[:, 1:])
        np.maximum(across, 0, out=across)
        np.maximum(down, 0, out=down)
        self._paint(box, (down[:, :, None] * across[:, None, :]).astype(np.float32), colour, thing)

    def ellipse(self, lo: np.ndarray, hi: np.ndarray, colour: np.ndarray, thing: int) -> None:
        """Upright ellipses that fill the rectangles between corners ``lo`` and ``hi`` ``[T, 2]``."""
        centre = (lo + hi) * (0.5 * self.size)
        radius = np.maximum((hi - lo) * (0.5 * self.size), 0.25)
        box = self._box((centre - radius).min(0), (centre + radius).max(0))
        if box is None:
            return
        x0, x1, y0, y1 = box
        dx = (self._pixels[x0:x1] + 0.5 - centre[:, :1]) / radius[:, :1]
        dy = (self._pixels[y0:y1] + 0.5 - centre[:, 1:]) / radius[:, 1:]
        inside = 1 - np.sqrt((dy * dy)[:, :, None] + (dx * dx)[:, None, :])
        cover = inside * radius.min(1)[:, None, None] + 0.5
        self._paint(box, np.clip(cover, 0, 1).astype(np.float32), colour, thing)

    def quad(self, corners: np.ndarray, colour: np.ndarray, thing: int) -> None:
        """Convex four-sided shapes; ``corners`` ``[T, 4, 2]`` go around, either way."""
        corners = corners * self.size
        box = self._box(corners.min((0, 1)), corners.max((0, 1)))
        if box is None:
            return
        x0, x1, y0, y1 = box
        edge = np.roll(corners, -1, axis=1) - corners
        turning = edge[:, 0, 0] * edge[:, 1, 1] - edge[:, 0, 1] * edge[:, 1, 0]
        normal = edge[..., ::-1] * np.where(turning < 0, 1, -1)[:, None, None] * (1, -1)
        normal /= np.maximum(np.hypot(edge[..., 0], edge[..., 1]), 1e-6)[..., None]
        offset = -(normal * corners).sum(-1)
        px, py = self._pixels[x0:x1] + 0.5, self._pixels[y0:y1] + 0.5
        sides = []
        for k in range(4):
            rows = normal[:, k, 1, None] * py + offset[:, k, None] + 0.5
            distance = rows[:, :, None] + (normal[:, k, 0, None] * px)[:, None, :]
            sides.append(np.clip(distance.astype(np.float32), 0, 1))
        # Opposite sides share a pixel that is wider than the shape: what neither cuts off is left.
        cover = np.maximum(sides[0] + sides[2] - 1, 0) * np.maximum(sides[1] + sides[3] - 1, 0)
        self._paint(box, cover, colour, thing)

    def _box(self, lo: np.ndarray, hi: np.ndarray) -> tuple[int, int, int, int] | None:
        """Pixel range x0, x1, y0, y1 around all frames' shapes; None outside the picture."""
        x0, y0 = (max(int(np.floor(v)) - 1, 0) for v in lo)
        x1, y1 = (min(int(np.ceil(v)) + 1, self.size) for v in hi)
        return (x0, x1, y0, y1) if x0 < x1 and y0 < y1 else None

    def _paint(
        self, box: tuple[int, int, int, int], cover: np.ndarray, colour: np.ndarray, thing: int
    ) -> None:
        x0, x1, y0, y1 = box
        if self.rgb is not None:
            part = self.rgb[:, y0:y1, x0:x1]
            colour = np.asarray(colour, np.float32).reshape(-1, 1, 1, 3)
            part += cover[..., None] * (colour - part)
        if thing >= 0:
            solid = cover > 0.5
            part = self.owner[:, y0:y1, x0:x1]
            self.drawn[thing] += (solid & (part != thing)).sum((1, 2))
            part[solid] = thing
