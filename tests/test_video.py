"""read_video: which frames it takes, from which files, and what it says about the others."""

from __future__ import annotations

import math
from pathlib import Path

import av
import numpy as np
import pytest

from specfuse.data.video import read_video

HEIGHT, WIDTH = 48, 64


def write_video(path: Path, frames: int, codec: str = "mpeg4", options: dict[str, str] | None = None) -> Path:
    """Writes frames whose grey level is ``5 * index``, so that a decoded frame tells its index."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if codec != "gif":
            stream.bit_rate = 2_000_000
        for index in range(frames):
            picture = np.full((HEIGHT, WIDTH, 3), 5 * index, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def indices_of(clip: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 5) for frame in clip]


@pytest.mark.parametrize("total", [8, 9, 17, 40])
@pytest.mark.parametrize("num_frames", [1, 3, 8])
def test_takes_the_frames_of_the_documented_rule(tmp_path: Path, total: int, num_frames: int) -> None:
    clip = read_video(write_video(tmp_path / "clip.mp4", total), num_frames)
    assert clip.shape == (num_frames, HEIGHT, WIDTH, 3) and clip.dtype == np.uint8
    assert indices_of(clip) == [math.floor(i * total / num_frames) for i in range(num_frames)]


@pytest.mark.parametrize(
    ("name", "codec"), [("clip.mkv", "mpeg4"), ("clip.ts", "mpeg2video"), ("clip.mpg", "mpeg2video")]
)
def test_containers_that_do_not_declare_their_frame_count(tmp_path: Path, name: str, codec: str) -> None:
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", 2_000_000
        for index in range(20):
            picture = np.full((HEIGHT, WIDTH, 3), 5 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames != 20, "the case this test is for"
    assert indices_of(read_video(path, 4)) == [0, 5, 10, 15]


@pytest.mark.parametrize("declared", [0, 3, 8, 19, 21, 1000])
@pytest.mark.filterwarnings("error")
def test_a_wrong_declared_frame_count_changes_nothing(tmp_path: Path, declared: int) -> None:
    path = write_video(tmp_path / "clip.avi", 20)
    data = bytearray(path.read_bytes())
    at = data.find(b"strh") + 8 + 32  # the stream's length, which crashed recorders leave at anything
    assert data[at : at + 4] == (20).to_bytes(4, "little")
    data[at : at + 4] = declared.to_bytes(4, "little")
    path.write_bytes(data)
    assert indices_of(read_video(path, 4)) == [0, 5, 10, 15]


def test_animated_gif(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.gif", 12, "gif")
    clip = read_video(path, 4)
    # rgb8 has 8 levels of red and green; the order and the distance of the frames survive.
    means = clip.mean(axis=(1, 2, 3))
    assert clip.shape == (4, HEIGHT, WIDTH, 3) and (np.diff(means) > 0).all()


def test_real_gif(shared_data: Path) -> None:
    path = shared_data / "gota_slomo.gif"
    clip = read_video(path)
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    expected = [every[int(i)] for i in np.arange(0, len(every), len(every) / 8)]
    np.testing.assert_array_equal(clip, expected)


def test_too_few_frames_says_how_many(tmp_path: Path) -> None:
    path = write_video(tmp_path / "short.mp4", 5)
    with pytest.raises(ValueError, match=r"short\.mp4 holds 5 frames, 8 are needed"):
        read_video(path)
    assert len(read_video(path, 5)) == 5


def test_no_video_stream(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        samples = np.zeros((1, 8000), np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound\.wav has no video stream"):
        read_video(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4"):
        read_video(tmp_path / "nowhere.mp4")
    with pytest.raises(ValueError, match="is not a file"):
        read_video(tmp_path)


@pytest.mark.parametrize("content", [b"", b"this is a text file, not a video\n" * 20])
def test_not_a_video(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.mp4 (can not be (read|decoded)|has no video)") as failure:
        read_video(path)
    assert "\n" not in str(failure.value)


def test_truncated_file(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", 40).read_bytes()
    path = tmp_path / "half.mp4"
    path.write_bytes(whole[: len(whole) // 2])  # the index of an mp4 is at its end
    with pytest.raises(ValueError, match=r"half\.mp4 can not be read"):
        read_video(path)


@pytest.mark.parametrize("num_frames", [0, -1])
def test_num_frames_below_one(tmp_path: Path, num_frames: int) -> None:
    with pytest.raises(ValueError, match="num_frames must be at least 1"):
        read_video(write_video(tmp_path / "clip.mp4", 8), num_frames)
