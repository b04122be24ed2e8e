"""Event streams as pictures."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from specfuse.events.stream import EventStream
from specfuse.events.tensors import EventTensors

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 16  # events drawn at a time: their pixel numbers stay in the processor's cache
PALETTE = ((0, 0, 255), (255, 0, 0), (255, 255, 255))  # of OFF, ON, and a pixel without events
NONE = 2  # the last colour's number

_OFF_ON = np.array(PALETTE[:NONE], np.uint8).reshape(-1).view("V3")

Size = tuple[int, int] | str | None


@overload
def render_eventgpt(stream: EventStream, num_images: int = 5, size: Size = None) -> list[np.ndarray]: ...


@overload
def render_eventgpt(stream: EventTensors, num_images: int = 5, size: Size = None) -> list[Tensor]: ...


def render_eventgpt(
    stream: EventStream | EventTensors, num_images: int = 5, size: Size = None
) -> list[np.ndarray] | list[Tensor]:
    """EventGPT's pictures: red and blue dots on white, one picture per equal share of the events.

    The stream is cut into ``num_images`` pieces of ``len(stream) // num_images`` events; the last takes the
    rest. Where a pixel has several events, the last one decides.

    Equivalent to, for every piece::

        image = np.full((height, width, 3), 255, np.uint8)
        for x, y, p in zip(piece.x, piece.y, piece.p):
            image[y, x] = (0, 0, 255) if p == 0 else (255, 0, 0)

    Args:
        stream: E events; as tensors, the pictures are made on their device, equal byte for byte.
        num_images: n, how many pictures.
        size: ``(height, width)`` of the pictures; None for the sensor's; ``"infer"`` for each piece's own
            ``max(y) + 1`` by ``max(x) + 1``, as EventGPT does.

    Returns:
        n arrays, or tensors of the stream's device, ``[H, W, 3]``, uint8 RGB.

    Raises:
        ValueError: ``num_images`` below 1; a size too small for the events; ``"infer"`` with an empty piece.

    Source: EventGPT (Liu et al. 2025), ``generate_event_image``.
    """
    num_images = operator.index(num_images)
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    pieces: list[Any] = list(stream.split(num_images))
    draw: Any = _picture if isinstance(stream, EventStream) else _tensor_picture
    return [draw(piece, _canvas(piece, i, size)) for i, piece in enumerate(pieces)]


def _canvas(piece: EventStream | EventTensors, number: int, size: Size) -> tuple[int, int]:
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
    height, width = (operator.index(side) for side in size)  # products of narrow numbers overflow
    if height < max(needed[0], 1) or width < max(needed[1], 1):
        raise ValueError(f"size {size} is too small: events of piece {number} need {needed}")
    return height, width


def _picture(piece: EventStream, canvas: tuple[int, int]) -> np.ndarray:
    colours = np.full(canvas[0] * canvas[1], NONE, np.uint8)
    for start in range(0, len(piece), BLOCK):
        part = slice(start, start + BLOCK)
        pixels = piece.y[part].astype(np.intp)
        pixels *= canvas[1]
        pixels += piece.x[part]
        # NumPy stores repeated indices in order, so the last event of a pixel stays.
        colours[pixels] = piece.p[part]
    image = np.full((*canvas, 3), PALETTE[NONE], np.uint8)
    drawn = np.flatnonzero(colours != NONE)
    # A colour is one item of three bytes.
    image.reshape(-1).view("V3")[drawn] = _OFF_ON[colours[drawn]]
    return image


def _tensor_picture(piece: EventTensors, canvas: tuple[int, int]) -> Tensor:
    import torch

    device = piece.p.device
    # Which of several stores to one place stays is not defined on a GPU; the largest number is. Numbers
    # grow with the events and their last bit is the polarity.
    number = torch.arange(len(piece), device=device) * 2 + piece.p
    last = torch.full((canvas[0] * canvas[1],), -1, dtype=torch.int64, device=device)
    last.scatter_reduce_(0, piece.y.long() * canvas[1] + piece.x, number, "amax")
    colours = torch.where(last < 0, NONE, last & 1)
    return torch.tensor(PALETTE, dtype=torch.uint8, device=device)[colours].reshape(*canvas, 3)
