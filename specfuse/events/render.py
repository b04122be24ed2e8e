"""Event streams as pictures."""

from __future__ import annotations

import numpy as np

from specfuse.events.stream import EventStream

_OFF_ON = np.array([0, 0, 255, 255, 0, 0], np.uint8).view("V3")  # blue, red


def render_eventgpt(
    stream: EventStream, num_images: int = 5, size: tuple[int, int] | str | None = None
) -> list[np.ndarray]:
    """EventGPT's pictures: red and blue dots on white, one picture per equal share of the events.

    The stream is cut into ``num_images`` pieces of ``len(stream) // num_images`` events; the last takes the
    rest. Where a pixel has several events, the last one decides.

    Equivalent to, for every piece::

        image = np.full((height, width, 3), 255, np.uint8)
        for x, y, p in zip(piece.x, piece.y, piece.p):
            image[y, x] = (0, 0, 255) if p == 0 else (255, 0, 0)

    Args:
        stream: E events.
        num_images: n, how many pictures.
        size: ``(height, width)`` of the pictures; None for the sensor's; ``"infer"`` for each piece's own
            ``max(y) + 1`` by ``max(x) + 1``, as EventGPT does.

    Returns:
        n arrays ``[H, W, 3]``, uint8 RGB.

    Raises:
        ValueError: ``num_images`` below 1; a size too small for the events; ``"infer"`` with an empty piece.

    Source: EventGPT (Liu et al. 2025), ``generate_event_image``.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    return [_picture(piece, _canvas(piece, i, size)) for i, piece in enumerate(stream.split(num_images))]


def _canvas(piece: EventStream, number: int, size: tuple[int, int] | str | None) -> tuple[int, int]:
    if size is None:
        return piece.height, piece.width
    needed = (int(piece.y.max()) + 1, int(piece.x.max()) + 1) if len(piece) else (0, 0)
    if isinstance(size, str):
        if size != "infer":
            raise ValueError(f'size must be (height, width), None or "infer", got {size!r}')
        if not len(piece):
            raise ValueError(
                f"piece {number} holds no events: its size cannot be inferred, give size=(height, width)"
            )
        return needed
    height, width = size
    if height < max(needed[0], 1) or width < max(needed[1], 1):
        raise ValueError(f"size {size} is too small: events of piece {number} need {needed}")
    return height, width


def _picture(piece: EventStream, canvas: tuple[int, int]) -> np.ndarray:
    image = np.full((*canvas, 3), 255, np.uint8)
    # NumPy stores repeated indices in order, so the last event of a pixel stays. A colour is one 3-byte item.
    pixels = image.reshape(-1).view("V3")
    pixels[piece.y.astype(np.intp) * canvas[1] + piece.x] = _OFF_ON[piece.p]
    return image
