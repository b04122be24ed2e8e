"""Real recordings through reader, pictures, processor and the shipped EventGPT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from specfuse.data import miniature
from specfuse.drafters.event import EventDrafter
from specfuse.events import EventStream, load, render_eventgpt
from specfuse.events.video import simulate_video
from specfuse.models.checkpoint import load_eventgpt

RECORDINGS = ("dsec_events_50ms.npz", "dsec_events_interlaken.npz")
QUESTION = "How many cars are visible?"
SHOWN = Path(__file__).resolve().parents[1] / "docs" / "images" / "dsec_events_interlaken_2.png"


@pytest.fixture(scope="module")
def eventgpt() -> tuple[Any, Any]:
    return load_eventgpt(miniature.directory("tiny-eventgpt"), dtype=torch.float32)


def recording(folder: Path, name: str) -> Path:
    if not (folder / name).exists():
        pytest.skip(f"no {name} at {folder}")
    return folder / name


def reply(eventgpt: tuple[Any, Any], stream: EventStream) -> list[int]:
    model, processor = eventgpt
    inputs = processor(text=processor.prompt(QUESTION), events=stream)
    ids = model.generate(**inputs, max_new_tokens=96, do_sample=False)[0]
    return ids[inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recording_is_answered_about(shared_data: Path, eventgpt: tuple[Any, Any], name: str) -> None:
    model, processor = eventgpt
    stream = load(recording(shared_data, name))
    pictures = render_eventgpt(stream)
    pixels = processor(events=stream)["pixel_values_events"]
    assert pixels.shape == (1, 5, 3, 64, 64) and bool(pixels.isfinite().all())
    assert torch.equal(pixels, processor(event_images=pictures)["pixel_values_events"])
    answer = reply(eventgpt, stream)
    text = processor.tokenizer.decode(answer, skip_special_tokens=True)
    assert answer[-1] == processor.tokenizer.eos_token_id and " visible." in text
    # The drafter for a target sees what the model alone sees, and sees it of a file as well.
    drafter = EventDrafter(model, processor, processor)
    seen = drafter.see(str(shared_data / name))["event_features"]
    torch.testing.assert_close(seen, model.get_event_features(pixels).detach())


def test_recordings_are_told_apart(shared_data: Path, eventgpt: tuple[Any, Any]) -> None:
    model, processor = eventgpt
    streams = [load(recording(shared_data, name)) for name in RECORDINGS]
    one, other = model.get_event_features(processor.pixels(streams)).detach().flatten(1)
    flipped = EventStream(*(getattr(streams[1], n) for n in "xyt"), 1 - streams[1].p, 640, 480)
    swapped = model.get_event_features(processor.pixels(flipped)).detach().flatten(1)[0]
    cosine = torch.nn.functional.cosine_similarity
    # Swapped colours are another picture of the same scene: nearer than another scene, but not the same.
    assert cosine(one, other, 0) < cosine(other, swapped, 0) < 0.9999
    assert reply(eventgpt, streams[0]) != reply(eventgpt, streams[1])


def test_the_picture_that_is_shown_is_the_recordings(shared_data: Path) -> None:
    stream = load(recording(shared_data, "dsec_events_interlaken.npz"))
    assert np.array_equal(Image.open(SHOWN).convert("RGB"), render_eventgpt(stream)[2])
    assert SHOWN.stat().st_size < 40_000


def test_a_real_clip_makes_events(shared_data: Path, eventgpt: tuple[Any, Any]) -> None:
    """A falling drop: events lie where it moves, and none of it is lost on the way to the model."""
    stream = simulate_video(recording(shared_data, "gota_slomo.gif"), size=(120, 160), seconds=0.5)
    counts = np.zeros((120, 160), np.int64)
    np.add.at(counts, (stream.y, stream.x), 1)
    middle = counts[:, 60:100].mean()
    assert len(stream) > 1000 and middle > 3 * counts[:, :40].mean()
    assert reply(eventgpt, stream)
