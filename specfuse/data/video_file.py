"""The frames of a video file with PyAV: decoded past damage, turned as players show them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from specfuse.data.video_open import avi_breaks_off, film, opened, reason

LEAST = 0.25  # of the frames of a damaged file: with fewer decoded it is not the video any more
TIMED = {"matroska", "flv", "asf"}  # containers whose header tells how long they are, once they are whole


class _Damaged(Exception):
    """Something in a file cannot be decoded."""


class VideoFrames:
    """The frames of a file's film, one after the other, as PyAV gives them; may be iterated again.

    The film is the video stream that players show: no cover art, no thumbnails. Packets that cannot be
    decoded are passed over, as players do; :meth:`report` tells of them.

    Args:
        path: of a file that exists.

    Raises:
        ValueError: not a video file, or none with a film; says what it seems to be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file, opened(path, file) as container:
            self._stream = film(path, container)
            #: How many frames the container announces; 0 where it does not tell. Not always true.
            self.announced = int(container.streams[self._stream].frames)
            # An index tells the truth, a header may not: only that it does not fit a file that breaks off.
            self._counts = "mov" in container.format.name.split(",") or avi_breaks_off(file)
        self._hidden = False  # packets without a frame are no damage here
        self._reset()

    def _reset(self) -> None:
        self.found = self._failed = self._packets = self._discarded = self._marred = 0
        self._seconds = self._announced_seconds = 0.0  # how far the packets reach, and how far they should
        self._reason, self._whole = "", False

    def __iter__(self) -> Iterator[Any]:
        """Decodes from the beginning.

        Raises:
            ValueError: nothing, or hardly anything, can be decoded.
        """
        self._reset()
        try:
            for frame in self._decoded(threads=True):
                self.found += 1
                yield frame
        except _Damaged:
            # Threads report a damaged packet late and drop frames with it: once more with a single one.
            before = self.found
            self._reset()
            for frame in self._decoded(threads=False):
                self.found += 1
                if self.found > before:
                    yield frame
            self._hidden = not self._failed + self._marred
        self._whole = True
        self._refuse_ruins()

    def _decoded(self, threads: bool) -> Iterator[Any]:
        """Frames; with threads, only those before the first damage.

        Raises:
            _Damaged: with threads, at the first damage.
        """
        import av

        with self.path.open("rb") as file, opened(self.path, file) as container:
            stream = container.streams[self._stream]
            stream.thread_type = "AUTO" if threads else "NONE"
            if not threads:
                stream.codec_context.thread_count = 1
            packets = container.demux(stream, *container.streams.audio)
            packet, frames = None, []
            while True:
                try:
                    packet = next(packets, None)
                    if packet is None:
                        break
                    frames = self._frames(packet)
                except (av.FFmpegError, OSError) as error:
                    if threads:
                        raise _Damaged from None
                    self._failed, self._reason = self._failed + 1, reason(error)
                    # Without a packet, reading on is not possible, but frames may wait in the decoder.
                    frames = stream.codec_context.decode(None) if packet is None else []
                if threads and any(frame.is_corrupt for frame in frames):
                    raise _Damaged
                self._marred += sum(bool(frame.is_corrupt) for frame in frames)
                yield from frames
                packet = None
            if TIMED & {*container.format.name.split(",")}:
                announced = (container.duration or 0) + max(container.start_time or 0, 0)
                self._announced_seconds = announced / av.time_base
        if threads and not self._hidden and self.found < self._packets - self._discarded:
            raise _Damaged  # PyAV keeps an error to itself where frames come with it

    def _frames(self, packet: Any) -> list[Any]:
        """What the decoder gives for a packet."""
        if packet.pts is not None and packet.time_base:
            self._seconds = max(
                self._seconds, float((packet.pts + (packet.duration or 0)) * packet.time_base)
            )
        if packet.stream.index != self._stream:
            return []
        if packet.size:
            self._packets += 1
            self._discarded += bool(packet.is_discard)
        try:
            return packet.decode()
        except EOFError:
            return []

    @property
    def lost(self) -> int:
        """Frames, as far as can be told, that the file should hold beside those that were found."""
        expected = self.announced if self._counts and self._whole else 0
        missing = max(0, expected - self._packets)
        return max(self._failed + missing, expected - self._discarded - self.found)

    def _refuse_ruins(self) -> None:
        total = self.found + self.lost
        if not self.found or self.found < LEAST * total:
            held = f"{self.found} of its {total} frames are whole" if total else "it holds no frames"
            raise ValueError(
                f"{self.path} can not be decoded: {held}{': ' if self._reason else ''}{self._reason}"
            )

    def report(self) -> None:
        """One warning, if frames are lost or show damage: how many."""
        total, told = self.found + self.lost, []
        if self.lost:
            told.append(f"{self.lost} of its {total} frames are lost, the {self.found} others are used")
        if self._marred:
            told.append(f"{self._marred} of its {self.found} frames show damage")
        if self._announced_seconds - self._seconds > max(0.1 * self._announced_seconds, 0.5) and not told:
            told.append(
                f"it announces {self._announced_seconds:.1f} seconds and ends after {self._seconds:.1f}, the "
                f"{self.found} frames before that are used"
            )
        if told:
            warnings.warn(f"{self.path} is damaged or truncated: {'; '.join(told)}", stacklevel=3)


def picture(frame: Any, format: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """A frame as players show it: turned and mirrored as the file's display matrix tells.

    Args:
        frame: of PyAV.
        format: ``rgb24`` or ``gray``.
        size: ``(height, width)`` that the shown picture is brought to; its own if None.

    Returns:
        ``[H, W, 3]`` or ``[H, W]``, uint8.
    """
    a, b, c, d = _display_matrix(frame)
    turned = _turned(frame)
    height, width = shown_size(frame) if size is None else size
    if turned:
        height, width = width, height
    shown = frame.to_ndarray(format=format, width=width, height=height)
    if turned:
        shown, right, down = shown.swapaxes(0, 1), c, b
    else:
        right, down = a, d
    return np.ascontiguousarray(shown[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1])


def shown_size(frame: Any) -> tuple[int, int]:
    """``(height, width)`` of a frame as players show it."""
    return (frame.width, frame.height) if _turned(frame) else (frame.height, frame.width)


def _turned(frame: Any) -> bool:
    """Whether rows are shown as columns."""
    a, b, c, d = _display_matrix(frame)
    return abs(b) + abs(c) > abs(a) + abs(d)


def _display_matrix(frame: Any) -> tuple[float, float, float, float]:
    """``a, b, c, d``: a pixel (x, y) is shown at (a x + c y, b x + d y)."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV knows no name for something else that comes with the frame
        angle = math.radians(frame.rotation)  # against the clock
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if data is None:
        return 1, 0, 0, 1
    matrix = np.frombuffer(bytes(data), np.int32)
    return int(matrix[0]), int(matrix[1]), int(matrix[3]), int(matrix[4])
