"""Videos as users have them: odd names, cover art, several streams, damage, turned phones, and no videos."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import av
import numpy as np
import pytest
from event_cases import noise
from PIL import Image, ImageOps
from test_video import HEIGHT, WIDTH, indices_of, write_video

from specfuse.data.video import decoded_frames, read_video
from specfuse.events import save
from specfuse.events.video import simulate_video
from specfuse.video_prompt import load_frames

SHAPE = (8, HEIGHT, WIDTH, 3)

# ---------------------------------------------------------------- names

NAMES = [
    "2024-05-01T12:30:00.mp4",
    "concat:a.mp4",
    "file:x",
    "http:x.mp4",
    "data:video.mp4",
    "crypto:x",
    "pipe:0",
]
NAMES += [
    "a%03d.mp4",
    "%d.png",
    "*.mp4",
    "?.jpg",
    "[1-3].jpg",
    "-i.mp4",
    "-",
    "a|b.mp4",
    "~x",
    "größe 视频.mp4",
]
NAMES += ["x.txt", "x.nfo", "x.m3u8", "x.ffconcat", "x.raw", "a\nb.mp4"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_video(tmp_path / "plain.mp4", 16).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (name, Path(name), tmp_path / name):
        assert indices_of(load_frames(path)) == list(range(0, 16, 2))
    assert len(simulate_video(name, size=(8, 8))) > 0


def test_only_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "1.mp4", 8)
    for name in ("http://localhost:1/a.mp4", "file:1.mp4", "%d.mp4", "*.mp4", "-", "concat:1.mp4|1.mp4"):
        with pytest.raises(FileNotFoundError, match="no such video file"):
            read_video(name)
    for directory in (".", tmp_path):
        with pytest.raises(ValueError, match="is not a file"):
            simulate_video(directory)


# ---------------------------------------------------------------- which stream


def with_cover(path: Path) -> None:
    """Puts a cover of 32 x 32 into an mp4, as music and film shops do: it becomes the first stream."""

    def box(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(body), kind) + body

    cover = io.BytesIO()
    Image.new("RGB", (32, 32), (255, 0, 0)).save(cover, "JPEG")
    value = box(b"covr", box(b"data", struct.pack(">II", 13, 0) + cover.getvalue()))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", value)))
    data, out, at = path.read_bytes(), b"", 0
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        part = data[at : at + size]
        if kind == b"moov":
            first = struct.unpack(">I", part[8:12])[0]
            part = box(b"moov", part[8 : 8 + first] + tags + part[8 + first :])
        out, at = out + part, at + size
    path.write_bytes(out)


def test_cover_art_is_not_the_film(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 16)
    with_cover(path)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2, "the case this test is for"
    assert read_video(path, 1).shape == (1, *SHAPE[1:])
    assert indices_of(read_video(path)) == list(range(0, 16, 2))
    full = simulate_video(path)
    assert (full.height, full.width) == (HEIGHT, WIDTH)


def sound(path: Path, codec: str, cover: bool) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=44100)
        stream.layout = "mono"
        if cover:
            art = container.add_stream("mjpeg", rate=1)
            art.width, art.height, art.pix_fmt = 32, 32, "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
            picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 200, np.uint8), format="rgb24")
            container.mux(art.encode(picture))
            container.mux(art.encode())
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 44100, i * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_sound_with_cover_art_is_no_video(tmp_path: Path) -> None:
    path = sound(tmp_path / "song.flac", "flac", cover=True)
    music = sound(tmp_path / "song.m4a", "aac", cover=False)
    with_cover(music)
    for file in (path, music):
        for count in (1, 8):
            with pytest.raises(ValueError, match=r"song\.\w+ has no video stream: all it shows is cover art"):
                read_video(file, count)


@pytest.mark.parametrize("kind", ["avif", "gif", "png"])
def test_moving_and_still_pictures(tmp_path: Path, kind: str) -> None:
    pictures = [Image.new("L", (WIDTH, HEIGHT), 20 * i).convert("RGB") for i in range(10)]
    try:
        pictures[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=pictures[1:], duration=100)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    clip = read_video(tmp_path / f"a.{kind}")
    assert clip.shape == SHAPE
    np.testing.assert_allclose(clip.mean((1, 2, 3)), [20 * (i * 10 // 8) for i in range(8)], atol=3)
    pictures[5].save(tmp_path / f"still.{kind}")
    assert read_video(tmp_path / f"still.{kind}", 1).shape == (1, *SHAPE[1:])
    with pytest.raises(ValueError, match="holds 1 frames, 8 are needed"):
        read_video(tmp_path / f"still.{kind}")


@pytest.mark.parametrize(
    ("streams", "taken"),
    [
        ([(1, 250, None), (20, 100, None)], 100),  # a still of one frame first
        ([(20, 250, None), (20, 100, "default")], 100),
        ([(20, 250, "default"), (20, 100, None)], 250),
    ],
)
def test_of_several_streams_the_one_players_show(
    tmp_path: Path, streams: list[tuple[int, int, str | None]], taken: int
) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        made = []
        for count, grey, flag in streams:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            if flag:
                stream.disposition = av.stream.Disposition[flag]
            stream.codec_context.open()
            made.append((stream, count, grey))
        for stream, count, grey in made:
            for _ in range(count):
                picture = np.full((HEIGHT, WIDTH, 3), grey, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    assert abs(float(read_video(path).mean()) - taken) < 4


# ---------------------------------------------------------------- text and other files

EVENTS_TEXT = "".join(f"{i / 1e4:.6f} {i * 7 % 240} {i * 5 % 180} {i % 2}\n" for i in range(2000))
TEXTS = {
    "events.txt": (EVENTS_TEXT.encode(), "it seems to be events as text"),
    "events.csv": (b"t,x,y,p\n" + EVENTS_TEXT.replace(" ", ",").encode(), "it seems to be events as text"),
    "notes.mp4": (b"just some words\n" * 300, "it seems to be a text file"),
    "a.srt": (b"1\n00:00:00,000 --> 00:00:02,000\nhello\n\n" * 20, "a text file"),
    "a.lrc": (b"[00:12.00]line\n" * 30, "a text file"),
    "a.m3u8": (b"#EXTM3U\n#EXTINF:5,\nreal.mp4\n#EXT-X-ENDLIST\n", "a playlist: give the path of the video"),
    "a.ffconcat": (b"ffconcat version 1.0\nfile real.mp4\n", "a playlist"),
    "a.ini": (b";FFMETADATA1\ntitle=x\n", "a text file"),
    "a.json": (b'{"a": [1, 2]}' * 50, "a text file"),
    "a.svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>", "a text file"),
    "a.html": ("<!doctype html><p>größer".encode() * 300, "a text file"),
    "wide.txt": ("words\n" * 300).encode("utf-16") and (("words\n" * 300).encode("utf-16"), "a text file"),
    "japanese.txt": ("日本語のテキスト\n".encode() * 300, "a text file"),
    "old.txt": ("größer\n".encode("latin-1") * 900, "a text file"),
    "art.nfo": (b"\x1b[31mart \xb1\xb2\xdb\r\n" * 200, "a text file"),
    "art.xb": (b"XBIN\x1a" + bytes([80, 0, 25, 0, 16, 0]) + b"A\x07" * 2000, "not in a format of videos"),
    "art.ans": (b"A\x07" * 3000, "can not be read"),
    "nothing": (bytes(5000), "can not be read"),
    "garbage": (np.random.default_rng(0).bytes(5000), "can not be read"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_video_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "real.mp4", 16)
    content, message = TEXTS[name]
    for given in (name, f"{name}.mp4"):
        (tmp_path / given).write_bytes(content)
        with pytest.raises(ValueError, match=message) as failure:
            read_video(given, 1)
        assert str(failure.value).startswith(f"{given} can not be read as a video: ")


def test_a_recording_of_events_is_told(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", noise(3000, 32, 24))
    (tmp_path / "a.raw").write_bytes(b"% evt 3.0\n% end\n" + bytes(5000))
    for name, kind in (("a.npz", "npz"), ("a.raw", "evt3")):
        with pytest.raises(ValueError, match=rf"it seems to be a recording of events \({kind}\)"):
            read_video(tmp_path / name)


# ---------------------------------------------------------------- damage


def film(path: Path, codec: str = "libx264") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"g": "10", "movflags": "+faststart"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for i in range(40):
            picture = np.zeros((96, 128, 3), np.uint8)
            picture[20:60, i * 2 : i * 2 + 30] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def damage(path: Path, which: Iterable[int]) -> None:
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for number in which:
        begin, size = places[number]
        data[begin : begin + size] = bytes(size)
    path.write_bytes(data)


def read_and_told(read: Callable[[], np.ndarray]) -> tuple[np.ndarray, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clip = read()
    return clip, [str(item.message) for item in caught if item.category is UserWarning]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("which", [[15], [0], [39], [5, 25, 26]])
def test_damaged_packets_are_passed_over(tmp_path: Path, codec: str, which: list[int]) -> None:
    path = film(tmp_path / "a.mp4", codec)
    damage(path, which)
    clip, told = read_and_told(lambda: read_video(path))
    with pytest.warns(UserWarning, match="frames are lost"):
        frames = list(decoded_frames(path))
    found = len(frames)
    assert 25 <= found <= 40 - len(which)
    assert (
        len(told) == 1 and f"{40 - found} of its 40 frames are lost, the {found} others are used" in told[0]
    )
    expected = [frames[i * found // 8].to_ndarray(format="rgb24") for i in range(8)]
    np.testing.assert_array_equal(clip, expected)
    for _ in range(3):
        np.testing.assert_array_equal(read_and_told(lambda: read_video(path))[0], clip)
    with pytest.warns(UserWarning, match="frames are lost"):
        simulate_video(path, size=(24, 32))


def test_one_lost_frame_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    whole = film(tmp_path / "whole.mp4")
    path = film(tmp_path / "a.mp4")
    damage(path, [15])
    every, told = read_and_told(
        lambda: np.stack([f.to_ndarray(format="rgb24") for f in decoded_frames(path)])
    )
    good = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded_frames(whole)])
    assert len(every) == 39 and len(told) == 1
    # Groups of ten frames begin anew: those of the others are the same to the bit.
    np.testing.assert_array_equal(every[:10], good[:10])
    np.testing.assert_array_equal(every[-20:], good[-20:])


def test_ruins_are_refused(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", "mpeg4")
    damage(path, range(4, 40))
    with pytest.raises(
        ValueError, match=r"a\.mp4 can not be decoded: \d of its 40 frames are whole: Invalid"
    ):
        read_video(path, 2)
    damage(path, range(40))
    with pytest.raises(ValueError, match=r"a\.mp4 can not be decoded: 0 of its 40 frames are whole"):
        list(decoded_frames(path))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_what_is_left_of_a_truncated_file(tmp_path: Path, name: str) -> None:
    path = film(tmp_path / name, "mpeg4") if name == "a.avi" else film(tmp_path / name)
    if name == "a.mp4":
        shutil.move(path, tmp_path / "b.mp4")
        with (
            av.open(str(tmp_path / "b.mp4")) as old,
            av.open(str(path), "w", options={"movflags": "faststart"}) as new,
        ):
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    new.mux(packet)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.8)])
    clip, told = read_and_told(lambda: read_video(path))
    assert clip.shape == (8, 96, 128, 3) and len(told) == 1
    assert ("announces 4.0 seconds" if name == "a.mkv" else "of its 40 frames are lost") in told[0]


# ---------------------------------------------------------------- turned and mirrored

MATRICES = {  # EXIF's number of the orientation: a, b, c, d
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


@pytest.mark.parametrize("orientation", MATRICES)
def test_frames_are_turned_and_mirrored_as_the_file_tells(tmp_path: Path, orientation: int) -> None:
    path = write_video(tmp_path / "a.mp4", 8)
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[:16, :16], picture[32:, :16, 0] = 255, 255  # a corner white, another red
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", 2_000_000
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    plain = read_video(path, 1)[0]
    a, b, c, d = MATRICES[orientation]
    data, one = bytearray(path.read_bytes()), 1 << 16
    at = data.find(b"tkhd") + 8 + 20 + 16
    data[at : at + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    exif = Image.Exif()
    exif[0x112] = orientation
    saved = io.BytesIO()
    Image.fromarray(plain).save(saved, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(saved)))
    clip = read_video(path, 3)
    assert clip.shape == (3, *expected.shape)
    np.testing.assert_array_equal(clip[0], expected)
    events = simulate_video(path)
    assert (events.height, events.width) == expected.shape[:2]


def test_a_video_opens_no_other_file(tmp_path: Path) -> None:
    """Nothing a playlist names is opened, not even to look."""
    fetched = tmp_path / "secret.mp4"
    write_video(fetched, 16)
    code = """
import sys
from specfuse.data.video import read_video
opened = []
sys.addaudithook(lambda name, args: opened.append(str(args[0])) if name == "open" else None)
try:
    read_video("list.mp4")
except ValueError as error:
    print(error)
sys.exit(any("secret" in path for path in opened))
"""
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "playlist" in done.stdout
