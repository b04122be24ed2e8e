"""Event streams as arrays for networks: counts, voxel grid, time surface; the same for tensors.

Given an ``EventStream`` they compute with NumPy and return arrays; given ``EventTensors`` they compute with
torch on its device and return tensors. Everything has one plane per polarity or time, then rows and columns.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, overload

import numpy as np

from specfuse.events.stream import EventStream
from specfuse.events.tensors import EventTensors

if TYPE_CHECKING:
    from torch import Tensor


@overload
def counts(events: EventStream) -> np.ndarray: ...


@overload
def counts(events: EventTensors) -> Tensor: ...


def counts(events: EventStream | EventTensors) -> np.ndarray | Tensor:
    """How many events every pixel had: ``[2, H, W]`` int32, OFF and ON.

    Equivalent to ``for x, y, p: out[p, y, x] += 1``.
    """
    planes = (2, events.height, events.width)
    if isinstance(events, EventTensors):
        import torch

        place = events.p.long() * (planes[1] * planes[2]) + events.pixels()
        return torch.bincount(place, minlength=2 * planes[1] * planes[2]).reshape(planes).int()
    place = events.p * np.intp(planes[1] * planes[2]) + _pixels(events)
    return np.bincount(place, minlength=2 * planes[1] * planes[2]).reshape(planes).astype(np.int32)


@overload
def voxel_grid(
    events: EventStream, bins: int, start_us: int | None = None, stop_us: int | None = None
) -> np.ndarray: ...


@overload
def voxel_grid(
    events: EventTensors, bins: int, start_us: int | None = None, stop_us: int | None = None
) -> Tensor: ...


def voxel_grid(
    events: EventStream | EventTensors, bins: int, start_us: int | None = None, stop_us: int | None = None
) -> np.ndarray | Tensor:
    """Polarities summed in space and time, each event shared between the two nearest times.

    ``V[b, y, x] = sum_i (2 p_i - 1) max(0, 1 - |b - (B - 1) (t_i - start) / (stop - start)|)`` over the
    events of the pixel.

    Args:
        events: E events, all of ``[start_us, stop_us]``.
        bins: B, number of times; the first is at ``start_us`` and the last at ``stop_us``.
        start_us: microseconds; the first event's time if None.
        stop_us: microseconds; the last event's time if None. Where it is ``start_us``, all falls in bin 0.

    Returns:
        ``[B, H, W]`` float32.

    Raises:
        ValueError: ``bins`` below 1, or events outside the times.

    Source: Zhu et al. 2019, "Unsupervised Event-based Learning of Optical Flow, Depth, and Egomotion".
    """
    bins = operator.index(bins)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    start, stop = _span(events, start_us, stop_us)
    scale = (bins - 1) / (stop - start) if stop > start else 0.0
    pixels = events.height * events.width
    if isinstance(events, EventTensors):
        import torch

        where = ((events.t - (start - events.origin_us)).float() * scale).clamp_(0, bins - 1)
        low = where.long()
        share, sign = where - low, events.p.float() * 2 - 1
        place = low * pixels + events.pixels()
        # One plane more takes the upper share of events on the last time, which is nought.
        grid = torch.zeros((bins + 1) * pixels, device=events.t.device)
        grid.index_add_(0, place, sign * (1 - share)).index_add_(0, place + pixels, sign * share)
        return grid[: bins * pixels].reshape(bins, events.height, events.width)
    at = (events.t - start) * scale
    below = np.minimum(at.astype(np.intp), bins - 1)
    upper, weight = at - below, events.p * 2.0 - 1
    index = below * pixels + _pixels(events)
    total = np.bincount(index, weight * (1 - upper), (bins + 1) * pixels)
    total += np.bincount(index + pixels, weight * upper, (bins + 1) * pixels)
    return total[: bins * pixels].astype(np.float32).reshape(bins, events.height, events.width)


@overload
def time_surface(events: EventStream, tau_us: float, at_us: int | None = None) -> np.ndarray: ...


@overload
def time_surface(events: EventTensors, tau_us: float, at_us: int | None = None) -> Tensor: ...


def time_surface(
    events: EventStream | EventTensors, tau_us: float, at_us: int | None = None
) -> np.ndarray | Tensor:
    """How recent the last event of every pixel and polarity is: ``exp((t_last - at) / tau)``, 0 without one.

    Args:
        events: E events.
        tau_us: decay, microseconds.
        at_us: the time of looking, microseconds; the last event's if None.

    Returns:
        ``[2, H, W]`` float32, OFF and ON.

    Raises:
        ValueError: ``tau_us`` not above 0, or events after ``at_us``.

    Source: Lagorce et al. 2017, "HOTS: A Hierarchy of Event-Based Time-Surfaces for Pattern Recognition".
    """
    if not tau_us > 0:
        raise ValueError(f"tau_us must be above 0, got {tau_us}")
    _, at = _span(events, None, at_us)
    planes = (2, events.height, events.width)
    if isinstance(events, EventTensors):
        import torch

        age = at - events.origin_us - events.t
        never = torch.iinfo(torch.int64).max
        youngest = torch.full((2 * planes[1] * planes[2],), never, device=age.device)
        place = events.p.long() * (planes[1] * planes[2]) + events.pixels()
        youngest.scatter_reduce_(0, place, age, "amin")
        return torch.exp(-youngest.float() / tau_us).where(youngest != never, 0.0).reshape(planes)
    last = np.full(planes, -np.inf)
    # Times never decrease and NumPy stores in order: what stays is the last event.
    last[events.p, events.y, events.x] = events.t - at
    return np.exp(last / tau_us).astype(np.float32)


def _pixels(events: EventStream) -> np.ndarray:
    return events.y.astype(np.intp) * events.width + events.x


def _span(events: EventStream | EventTensors, start_us: int | None, stop_us: int | None) -> tuple[int, int]:
    """The two times, the events' own where None; all events must lie between them."""
    origin = events.origin_us if isinstance(events, EventTensors) else 0
    first, last = (int(events.t[0]) + origin, int(events.t[-1]) + origin) if len(events) else (0, 0)
    # NumPy's narrow numbers overflow in differences, its unsigned ones make floats of times.
    given = [time.item() if isinstance(time, np.generic) else time for time in (start_us, stop_us)]
    start = first if given[0] is None else given[0]
    stop = max(last, start) if given[1] is None else given[1]
    if len(events) and (first < start or last > stop):
        raise ValueError(
            f"events from {first} to {last} us do not lie between the times given, {start} and {stop} us"
        )
    if stop < start:
        raise ValueError(f"stop_us must not be before start_us, got {start} and {stop}")
    return start, stop
