"""EventTensors: the columns of an EventStream on a torch device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from specfuse.events.stream import EventStream, shares

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class EventTensors:
    """E events in order of time, as tensors of one device. ``EventTensors.of`` makes them.

    Nothing is checked: the stream they come from was. Times are kept relative to its first event, so that
    devices without float64 compute with them exactly for 16 seconds and more.

    Args:
        x: ``[E]`` int32, column.
        y: ``[E]`` int32, row.
        t: ``[E]`` int64, microseconds after ``origin_us``, never decreasing.
        p: ``[E]`` uint8, 1 for ON, 0 for OFF.
        width: of the sensor, pixels.
        height: of the sensor, pixels.
        origin_us: time of the first event of the stream, microseconds.
    """

    x: Tensor
    y: Tensor
    t: Tensor
    p: Tensor
    width: int
    height: int
    origin_us: int = 0

    @classmethod
    def of(cls, stream: EventStream, device: torch.device | str = "cpu") -> EventTensors:
        """A copy of a stream's columns on ``device``."""
        import torch

        origin = int(stream.t[0]) if len(stream) else 0
        # Smaller types cross to the device; torch has too few operations on uint16 to keep it there.
        columns = {
            "x": torch.from_numpy(stream.x.view(np.int16).copy()).to(device).to(torch.int32) & 0xFFFF,
            "y": torch.from_numpy(stream.y.view(np.int16).copy()).to(device).to(torch.int32) & 0xFFFF,
            "t": torch.from_numpy(stream.t - origin).to(device),
            "p": torch.from_numpy(stream.p.copy()).to(device),
        }
        return cls(**columns, width=stream.width, height=stream.height, origin_us=origin)

    def __len__(self) -> int:
        return len(self.t)

    def split(self, parts: int) -> list[EventTensors]:
        """As ``EventStream.split``; shares memory."""
        return [self._part(slice(a, b)) for a, b in pairwise(shares(len(self), parts))]

    def pixels(self) -> Tensor:
        """``[E]`` int64: the place of every event's pixel in a picture of the sensor's size, row by row."""
        return self.y.long() * self.width + self.x

    def _part(self, piece: slice) -> EventTensors:
        x, y, t, p = (column[piece] for column in (self.x, self.y, self.t, self.p))
        return EventTensors(x, y, t, p, self.width, self.height, self.origin_us)
