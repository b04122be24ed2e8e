"""``specfuse events``: looks at recordings of event cameras, draws, converts and simulates them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from specfuse.cli import UserError, print_json, working

if TYPE_CHECKING:
    from specfuse.events import EventStream

events = typer.Typer(
    help="Look at recordings of event cameras; draw, convert and simulate them.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)

FILE = typer.Argument(..., help=".npz, DSEC's HDF5, Prophesee EVT2/EVT3/DAT or EventGPT's .npy.")
FORMAT = typer.Option(
    None,
    help="npz, hdf5, evt2, evt3, dat or npy; recognised if not given (but for a DAT file without a header).",
)
START = typer.Option(None, help="First microsecond of the slice, on the file's clock.")
END = typer.Option(None, help="Microsecond before which the slice ends.")
SENSOR = typer.Option(None, help="Size of the sensor as WIDTHxHEIGHT, where the file does not tell.")
MOST_PIXELS = 16384  # a side; far beyond any sensor, and a picture still fits into memory
BUSY_US = 10_000  # of `info`: the busiest stretch of this length


@events.command()
def info(
    file: Path = FILE,
    format: str | None = FORMAT,
    start_us: int | None = START,
    end_us: int | None = END,
    sensor: str | None = SENSOR,
    json: bool = typer.Option(False, "--json", help="Print JSON, alone on stdout."),
) -> None:
    """Count the events of a recording: duration, rate, sensor, polarities."""
    _check_slice(start_us, end_us)
    with _readable(), working("reading", shown=not json):
        figures = _figures(file, format, start_us, end_us, _pixels("--sensor", sensor))
    if json:
        print_json(figures)
        return
    print("\n".join(f"{name:<10}{text}" for name, text in _lines(figures)))


@events.command()
def render(
    file: Path = FILE,
    out: Path = typer.Option(..., help="Folder for the pictures; created if missing."),
    images: int = typer.Option(5, help="How many pictures share the events equally.", min=1),
    size: str | None = typer.Option(
        None,
        help="WIDTHxHEIGHT of the pictures, or infer: each just large enough; the sensor's if not given.",
    ),
    format: str | None = FORMAT,
    start_us: int | None = START,
    end_us: int | None = END,
    sensor: str | None = SENSOR,
) -> None:
    """Draw EventGPT's pictures: ON events red, OFF events blue, on white."""
    from PIL import Image

    from specfuse.events import render_eventgpt

    canvas = size if size == "infer" else _pixels("--size", size)
    stream = _loaded(file, format, start_us, end_us, sensor)
    if isinstance(canvas, tuple) and len(stream):
        height, width = int(stream.y.max()) + 1, int(stream.x.max()) + 1
        if canvas[0] < height or canvas[1] < width:
            raise UserError(f"--size must be at least {width}x{height} for these events, got {size!r}")
    if len(stream) < images:
        raise UserError(f"--images must be at most the {len(stream):,} events there are, got {images:,}")
    pictures = render_eventgpt(stream, images, canvas)
    out.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        path = out / f"{file.stem}_{i}.png"
        Image.fromarray(picture).save(path)
        print(path)


@events.command()
def convert(
    file: Path = FILE,
    out: Path = typer.Argument(..., help="File to write: .npz, .h5 or .hdf5."),
    format: str | None = FORMAT,
    start_us: int | None = START,
    end_us: int | None = END,
    sensor: str | None = SENSOR,
    compress: bool | None = typer.Option(
        None, "--compress/--no-compress", help="By default .h5 is compressed and .npz is not."
    ),
    force: bool = typer.Option(False, "--force", help="Replace OUT where it exists."),
) -> None:
    """Write a recording, or a slice of it, in another format."""
    from specfuse.events import save

    _check_out("OUT", out)
    if out.exists() and out.samefile(file):
        raise UserError(f"OUT must be another file than FILE, got {str(out)!r} for both")
    if out.exists() and not force:
        raise UserError(f"OUT {str(out)!r} exists; --force replaces it")
    stream = _loaded(file, format, start_us, end_us, sensor)
    with _readable(), working(f"writing {out}"):
        save(out, stream, compress=compress)
    print(f"{out}: {len(stream):,} events, {out.stat().st_size / 1e6:.1f} MB")


@events.command()
def simulate(
    source: str = typer.Argument(..., help="A clip of the driving world (0 to 5207) or a video file."),
    out: Path = typer.Option(..., help="File to write: .npz, .h5 or .hdf5."),
    size: str | None = typer.Option(
        None, help="WIDTHxHEIGHT of the sensor; 64x64 for the world, the video's size for a video."
    ),
    rate: int = typer.Option(
        128, help="Pictures a second that the world's brightness is followed with.", min=2
    ),
    seconds: float | None = typer.Option(None, help="Of a video, from its beginning; all if not given."),
    threshold: float | None = typer.Option(
        None, help="Change of the natural logarithm of the brightness that makes an event; 0.2 if not given."
    ),
    seed: int = typer.Option(0, help="Of the noise of a video's events."),
) -> None:
    """Simulate an event camera that looks at a clip of the driving world or at a video."""
    from specfuse.events import Sensor, save
    from specfuse.events.video import simulate_video

    _check_out("--out", out)
    if seed < 0:
        raise UserError(f"--seed must be 0 or above, got {seed}")
    model = Sensor() if threshold is None else Sensor(threshold_on=threshold, threshold_off=threshold)
    pixels = _pixels("--size", size)
    if seconds is not None and source.isdecimal():
        raise UserError(
            f"--seconds belongs to a video; a clip of the driving world is whole, got {seconds:g}"
        )
    with _readable(), working("simulating"):
        if source.isdecimal():
            stream = _world(int(source), pixels, rate, model)
        else:
            stream = simulate_video(source, model, pixels, seconds, seed)
        save(out, stream)
    print(f"{out}: {len(stream):,} events in {stream.duration_us / 1e6:.3f} s")


def _check_out(name: str, out: Path) -> None:
    # Before the work is done, not after it.
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{name} must be a file in an existing directory, got {str(out)!r}")
    from specfuse.events.files import SUFFIXES

    if out.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{name}: events are written as npz or hdf5 ({', '.join(SUFFIXES)}), got {str(out)!r}"
        )


def _world(index: int, pixels: tuple[int, int] | None, rate: int, sensor: Any) -> EventStream:
    from specfuse.data.world import NUM_CLIPS
    from specfuse.data.world import events as world_events

    if index >= NUM_CLIPS:
        raise UserError(f"the driving world has clips 0 to {NUM_CLIPS - 1}, got {index}")
    height, width = pixels or (64, 64)
    if height != width:
        raise UserError(f"--size of the driving world must be a square, got {width}x{height}")
    return world_events(index, height, rate, sensor)


def _figures(
    file: Path, format: str | None, start_us: int | None, end_us: int | None, size: tuple[int, int] | None
) -> dict[str, Any]:
    import numpy as np

    from specfuse.events import open_events

    with open_events(file, format, size=size) as opened:
        stream = opened.read(start_us, end_us)
        found = opened.format
        seconds = stream.duration_us / 1e6
        busiest = 0
        if len(stream):
            stretch = (stream.t - stream.t[0]) // BUSY_US
            # Numbers of stretches rise with the events: equal ones lie together.
            edges = np.flatnonzero(np.diff(stretch, prepend=-1, append=stretch[-1] + 1))
            busiest = int(np.diff(edges).max())
        on = int(np.count_nonzero(stream.p))
        return {
            "file": str(file),
            "format": found,
            "events": len(stream),
            "width": stream.width,
            "height": stream.height,
            "first_us": int(stream.t[0]) if len(stream) else None,
            "last_us": int(stream.t[-1]) if len(stream) else None,
            "duration_s": seconds,
            "events_per_s": len(stream) / seconds if seconds else None,
            f"busiest_{BUSY_US // 1000}_ms": busiest,
            "on": on,
            "off": len(stream) - on,
            "on_share": on / len(stream) if len(stream) else None,
        }


def _lines(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "file", f"{figures['file']} ({figures['format']})"
    yield "sensor", f"{figures['width']} x {figures['height']}"
    yield "events", f"{figures['events']:,}"
    if not figures["events"]:
        return
    yield "time", f"{figures['first_us']:,} to {figures['last_us']:,} us"
    yield "duration", f"{figures['duration_s']:.6f} s"
    rate, busiest = figures["events_per_s"], figures[f"busiest_{BUSY_US // 1000}_ms"]
    peak = f"busiest {BUSY_US // 1000} ms: {busiest * 1e6 / BUSY_US / 1e6:.2f} million/s"
    yield "rate", f"{rate / 1e6:.2f} million/s ({peak})" if rate else "all at one time"
    yield "polarity", f"{figures['on_share']:.1%} ON, {1 - figures['on_share']:.1%} OFF"


def _loaded(
    file: Path, format: str | None, start_us: int | None, end_us: int | None, sensor: str | None
) -> EventStream:
    from specfuse.events import load

    _check_slice(start_us, end_us)
    with _readable(), working(f"reading {file}"):
        return load(file, format, start_us=start_us, end_us=end_us, size=_pixels("--sensor", sensor))


def _check_slice(start_us: int | None, end_us: int | None) -> None:
    if start_us is not None and end_us is not None and end_us < start_us:
        raise UserError(f"--end-us must not be before --start-us, got {end_us} and {start_us}")


def _pixels(option: str, text: str | None) -> tuple[int, int] | None:
    """``(height, width)`` of an option's "640x480"."""
    if text is None:
        return None
    if not (found := re.fullmatch(r"([1-9]\d{0,4})[xX]([1-9]\d{0,4})", text)):
        raise UserError(f"{option} must be WIDTHxHEIGHT, such as 640x480, got {text!r}")
    width, height = int(found[1]), int(found[2])
    if max(width, height) > MOST_PIXELS:
        raise UserError(f"{option} must be at most {MOST_PIXELS}x{MOST_PIXELS}, got {text!r}")
    return height, width


@contextmanager
def _readable() -> Iterator[None]:
    """Turns a missing library into one line for the user."""
    try:
        yield
    except ImportError as error:
        raise UserError(str(error)) from None
