"""``specfuse events``: looking, drawing, converting, simulating; and mistakes of the user."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from event_cases import noise, same
from PIL import Image
from test_cli import refused
from test_video import write_video

from specfuse.cli.main import run
from specfuse.data.world import events as world_events
from specfuse.events import EventStream, Sensor, load, render_eventgpt, save
from specfuse.events.video import simulate_video


def events(*arguments: object) -> None:
    assert run(["events", *map(str, arguments)]) == 0


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    save(tmp_path / "a.npz", noise(5000, 32, 24, start_us=10**9))
    return tmp_path / "a.npz"


def test_info(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = load(recording)
    events("info", recording, "--json")
    figures = json.loads(capsys.readouterr().out)
    t = stream.t - stream.t[0]
    assert figures["events"] == 5000 and (figures["width"], figures["height"]) == (32, 24)
    assert figures["duration_s"] == t[-1] / 1e6 and figures["events_per_s"] == pytest.approx(5e9 / t[-1])
    assert figures["busiest_10_ms"] == np.bincount(t // 10_000).max()
    assert figures["on"] == stream.p.sum() and figures["on"] + figures["off"] == 5000
    middle = int(stream.t[2500])
    events("info", recording, "--start-us", middle, "--json")
    half = json.loads(capsys.readouterr().out)
    assert half["events"] == (stream.t >= middle).sum() and half["first_us"] == middle
    events("info", recording)
    printed = capsys.readouterr().out
    assert "32 x 24" in printed and "5,000" in printed and f"{figures['on_share']:.1%} ON" in printed


def test_info_on_few_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for count in (0, 1):
        save(tmp_path / "few.npz", noise(count, 4, 4))
        events("info", tmp_path / "few.npz", "--json")
        figures = json.loads(capsys.readouterr().out)
        assert figures["events"] == figures["busiest_10_ms"] == count and figures["events_per_s"] is None
        events("info", tmp_path / "few.npz")
        assert ("all at one time" in capsys.readouterr().out) == (count == 1)


def test_render(recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, size in (([], None), (["--size", "infer"], "infer"), (["--size", "40x30"], (30, 40))):
        events("render", recording, "--out", tmp_path / "png", "--images", 3, *arguments)
        paths = capsys.readouterr().out.split()
        expected = render_eventgpt(load(recording), 3, size)
        assert len(paths) == 3
        assert all(np.array_equal(Image.open(p), e) for p, e in zip(paths, expected, strict=True))


def test_convert_there_and_back(recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("h5py")
    stream = load(recording)
    events("convert", recording, tmp_path / "b.h5")
    events("convert", tmp_path / "b.h5", tmp_path / "c.npz", "--compress")
    assert same(load(tmp_path / "c.npz"), stream)
    assert (tmp_path / "c.npz").stat().st_size < recording.stat().st_size
    start, end = int(stream.t[100]), int(stream.t[900])
    events("convert", recording, tmp_path / "d.npz", "--start-us", start, "--end-us", end)
    assert same(load(tmp_path / "d.npz"), stream.between(start, end))
    assert "events" in capsys.readouterr().out


def test_convert_asks_before_it_replaces(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "old.npz"
    out.write_bytes(b"precious")
    line = refused(capsys, "events", "convert", recording, out)
    assert "old.npz' exists; --force replaces it" in line and out.read_bytes() == b"precious"
    events("convert", recording, out, "--force")
    assert same(load(out), load(recording))


def test_simulate_the_world(tmp_path: Path) -> None:
    events("simulate", 7, "--out", tmp_path / "w.npz", "--size", "16x16", "--rate", 16)
    assert same(load(tmp_path / "w.npz"), world_events(7, 16, 16))
    events("simulate", 7, "--out", tmp_path / "v.npz", "--size", "16x16", "--rate", 16, "--threshold", 0.5)
    assert 0 < len(load(tmp_path / "v.npz")) < len(load(tmp_path / "w.npz"))


def test_simulate_a_video(tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", 16)
    events("simulate", video, "--out", tmp_path / "v.npz", "--size", "24x16")
    stream = load(tmp_path / "v.npz")
    assert (stream.width, stream.height) == (24, 16) and len(stream) > 100
    assert same(stream, simulate_video(video, size=(16, 24)))
    short = simulate_video(video, size=(16, 24), seconds=stream.duration_us / 2e6)
    assert 0 < short.duration_us < stream.duration_us * 0.6
    full = simulate_video(video)
    frame_height, frame_width = full.height, full.width
    assert (frame_width, frame_height) == Image.fromarray(render_eventgpt(full, 1)[0]).size


def test_a_still_video_makes_noise_alone(tmp_path: Path) -> None:
    frames = [Image.new("L", (16, 16), 90)] * 3 + [Image.new("L", (16, 16), 91)]
    frames[0].save(tmp_path / "still.gif", save_all=True, append_images=frames[1:], duration=100)
    quiet = Sensor(mismatch=0, leak_hz=0, shot_hz=0)
    assert len(simulate_video(tmp_path / "still.gif", quiet)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "missing.npz"], "missing.npz: no such file of events"),
        (["info", "{a}", "--sensor", "640"], "--sensor must be WIDTHxHEIGHT, such as 640x480, got '640'"),
        (["info", "{a}", "--sensor", "8x8"], "outside the sensor: width is 8"),
        (["info", "{a}", "--format", "aedat"], "format must be one of npz, hdf5"),
        (["info", "{a}", "--end-us", "5"], "no events between its beginning and 5 us"),
        (["render", "{a}", "--out", "{tmp}/png", "--size", "3"], "--size must be WIDTHxHEIGHT"),
        (["render", "{a}", "--out", "{tmp}/png", "--size", "3x3"], "--size must be at least 32x24 for these"),
        (
            ["info", "{a}", "--start-us", "9", "--end-us", "5"],
            "--end-us must not be before --start-us, got 5",
        ),
        (["info", "{a}", "--start-us", "x"], "--start-us': Input should be a valid integer"),
        (["render", "{a}", "--out", "{tmp}/png", "--images=0"], "greater than or equal to 1, got '0'"),
        (["render", "{a}", "--out", "{tmp}/png", "--images", "5001"], "at most the 5,000 events there are"),
        (["render", "{a}", "--out", "{tmp}/png", "--size", "20000x99"], "--size must be at most 16384x16384"),
        (["simulate", "7", "--out", "{tmp}/b.npz", "--seconds", "1"], "--seconds belongs to a video"),
        (["simulate", "7", "--out", "{tmp}/b.raw"], "--out: events are written as npz or hdf5"),
        (["convert", "{a}", "{tmp}/b.raw"], "written as npz or hdf5"),
        (["convert", "{a}", "{a}", "--end-us", "1000002000"], "OUT must be another file than FILE"),
        (["convert", "{a}", "{tmp}/none/b.npz"], "OUT must be a file in an existing directory, got"),
        (["simulate", "7", "--out", "{tmp}/none/b.npz"], "--out must be a file in an existing directory"),
        (["simulate", "7", "--out", "{tmp}/b.npz", "--seed", "-1"], "--seed must be 0 or above, got -1"),
        (["simulate", "5208", "--out", "{tmp}/b.npz"], "clips 0 to 5207, got 5208"),
        (["simulate", "7", "--out", "{tmp}/b.npz", "--size", "8x9"], "must be a square, got 8x9"),
        (["simulate", "none.mp4", "--out", "{tmp}/b.npz"], "none.mp4: no such video file"),
        (["simulate", "{a}", "--out", "{tmp}/b.npz"], "can not be read as a video"),
        (["frobnicate"], "No such command 'frobnicate'"),
    ],
)
def test_mistakes(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = recording.read_bytes()
    line = refused(capsys, "events", *(a.format(a=recording, tmp=tmp_path) for a in arguments))
    assert message in line
    assert not (tmp_path / "png").exists() and not list(tmp_path.glob("b.*"))
    assert recording.read_bytes() == before


def test_without_the_extra(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "pip install 'specfuse[events]'" in refused(
        capsys, "events", "convert", recording, tmp_path / "b.h5"
    )


@pytest.mark.parametrize("name", ["info", "render", "convert", "simulate"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    events(name, "--help")
    assert f"events {name}" in capsys.readouterr().out


def test_recordings_are_read_and_drawn_without_torch(recording: Path, tmp_path: Path) -> None:
    code = "import sys; from specfuse.cli.main import run; "
    code += f"run(['events', 'render', {str(recording)!r}, '--out', {str(tmp_path / 'png')!r}]); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    assert len(list((tmp_path / "png").iterdir())) == 5


def test_bad_videos(tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", 16)
    with pytest.raises(ValueError, match="seconds must be above 0, got 0"):
        simulate_video(video, seconds=0)
    with pytest.raises(
        ValueError, match=r"fewer than two frames at different times in its first 1e-06 seconds"
    ):
        simulate_video(video, seconds=1e-6)
    assert isinstance(simulate_video(video, size=(8, 8), seconds=0.2), EventStream)
