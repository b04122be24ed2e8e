"""Opening video files by their bytes alone, which stream is shown, and words for what is no video."""

from __future__ import annotations

import codecs
import errno
import os
import re
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

# Demuxers that draw text, open other files, or take anything for pictures; and those of capture devices.
NOT_VIDEOS = frozenset(
    """tty bin xbin adf idf hls concat dash imf webm_dash_manifest image2 image2pipe alias_pix brender_pix
    ffmetadata rawvideo bitpacked v210 v210x lavfi rtp rtsp sap sdp alsa fbdev kmsgrab x11grab video4linux2
    v4l2""".split()  # noqa: SIM905  one a line would fill the screen
)
DRAWN_TEXT = ("ansi", "bintext", "xbin", "idf")  # codecs
TEXT = bytes(range(32, 127)) + b"\t\r\n\f\x1b"


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path of a video file that exists.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a directory or anything else that is not a file.
    """
    file = Path(os.fsdecode(path))
    if not file.exists():
        raise FileNotFoundError(errno.ENOENT, "no such video file", str(file))
    if not file.is_file():
        raise ValueError(f"{file} is not a file")
    return file


class _Bytes:
    """A file without its name: FFmpeg takes names for URLs, patterns of many files and kinds of content."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def opened(path: Path, file: BinaryIO) -> Any:
    """An open container; to be closed."""
    import av

    first = file.read(4096)
    file.seek(0)
    if what := _text(first):
        raise ValueError(f"{path} can not be read as a video: it seems to be {what}")
    try:
        return av.open(_Bytes(file), options={"format_whitelist": _whitelist()})
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ValueError(f"{path} can not be read as a video: {_guess(path, error)}") from None


@cache
def _whitelist() -> str:
    import av

    return ",".join(sorted(av.formats_available - NOT_VIDEOS))


def film(path: Path, container: Any) -> int:
    """Number of the stream that players show: moving before still, then as the file and FFmpeg prefer.

    Raises:
        ValueError: none; cover art, thumbnails and tiles of a picture are not counted.
    """
    from av.stream import Disposition

    beside = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent
    streams = container.streams.video
    if not streams:
        raise ValueError(f"{path} has no video stream")
    films = [stream for stream in streams if not stream.disposition & beside]
    if not films:
        held = "parts of a picture" if streams[0].disposition & Disposition.dependent else "cover art"
        raise ValueError(f"{path} has no video stream: all it shows is {held}")
    films = [stream for stream in films if stream.codec_context is not None]
    if not films:
        raise ValueError(f"{path} can not be decoded: FFmpeg has no decoder for its video stream")
    if drawn := [stream for stream in films if stream.codec_context.name in DRAWN_TEXT]:
        raise ValueError(
            f"{path} can not be read as a video: it seems to be text art ({drawn[0].codec_context.name})"
        )
    best = container.streams.best("video")

    def rank(stream: Any) -> tuple[bool, bool, bool, int]:
        still = stream.frames == 1 or bool(stream.disposition & Disposition.still_image)
        preferred = best is not None and stream.index == best.index
        size = stream.codec_context.width * stream.codec_context.height
        return not still, bool(stream.disposition & Disposition.default), preferred, size

    return max(films, key=rank).index


def avi_breaks_off(file: BinaryIO) -> bool:
    """Whether a file is an AVI that is shorter than it says."""
    size = file.seek(0, 2)
    file.seek(0)
    first = file.read(12)
    return first[:4] == b"RIFF" and first[8:] == b"AVI " and int.from_bytes(first[4:8], "little") + 8 > size


def _text(first: bytes) -> str:
    """What a file is that begins with letters; nothing for others."""
    if not first or re.match(rb"YUV4MPEG2 |P[1-7Ff]\s", first):  # videos and pictures may begin with letters
        return ""
    wide = first.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        # Not final: a letter may be cut in two at the end.
        letters = codecs.getincrementaldecoder("utf-16" if wide else "utf-8-sig")().decode(first)
    except UnicodeDecodeError:
        letters = first.decode("latin-1")  # or another of 8 bits, drawn with its upper half
        if sum(letter.isascii() for letter in letters) * 2 < len(letters):
            return ""
    if letters.encode("ascii", "ignore").translate(None, TEXT):
        return ""
    lines = letters.splitlines() or [""]
    if lines[0].startswith(("#EXTM3U", "ffconcat ", "[playlist]")):
        return "a playlist: give the path of the video itself"
    rows = [line.replace(",", " ").replace(";", " ").split() for line in lines[:-1] or lines]
    if sum(len(row) == 4 and all(_number(word) for word in row) for row in rows) * 2 > len(rows):
        return "events as text, four numbers a line: they are no video (and events are read from .npz or .h5)"
    return "a text file"


def _number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _guess(path: Path, error: Exception) -> str:
    """Why a file was not opened, and what it is if it is one of events."""
    import av

    from specfuse.events.files import recognise

    try:
        return f"it seems to be a recording of events ({recognise(path)})"
    except ValueError:
        pass
    if isinstance(error, av.ArgumentError):
        return "it is not in a format of videos (text art, playlists and lists of pictures are none)"
    return reason(error)


def reason(error: Exception) -> str:
    """What FFmpeg says, in one line."""
    text = getattr(error, "strerror", None) or str(error)
    return text.split("\n", 1)[0]
