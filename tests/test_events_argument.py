"""``events=`` and ``video=`` of a call: who takes them, in which forms, how often they are encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_eventgpt_drafter import GREEDY, QUESTION, a_tokenizer, asked
from test_eventgpt_drafter import drafter as drafter
from test_eventgpt_drafter import stream as stream
from test_eventgpt_drafter import target as target
from tiny_models import tiny_llama

import specfuse
from specfuse.data.world import events
from specfuse.drafters.event import EventDrafter
from specfuse.drafters.scenes import MOST_SCENES
from specfuse.events import EventStream, save
from specfuse.train.build import build_processor


@pytest.fixture
def encoded(drafter: EventDrafter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Streams of every call of the drafter's encoder, which starts knowing none."""
    drafter.scenes._kept.clear()
    counts: list[int] = []
    original = drafter.model.get_event_features

    def counting(pixels: Any) -> Any:
        counts.append(len(pixels))
        return original(pixels)

    monkeypatch.setattr(drafter.model, "get_event_features", counting)
    return counts


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)


def test_forms_of_events(
    drafter: EventDrafter, target: Any, stream: EventStream, encoded: list[int], tmp_path: Path
) -> None:
    save(tmp_path / "events.npz", stream)
    inputs = asked(target, QUESTION, "Is there a red car on the left?")
    plain = target.generate(**inputs)
    seen = drafter.see(stream)
    forms = (stream, [stream, stream], tmp_path / "events.npz", str(tmp_path / "events.npz"), seen)
    drafted = set()
    for form in forms:
        generator = specfuse.SpeculativeGenerator(target, drafter)
        assert torch.equal(generator.generate(events=form, **inputs), plain)
        drafted.add((generator.last_stats.passes, generator.last_stats.drafted))
    assert len(drafted) == 1
    hook = specfuse.custom_generate(drafter, events=stream)
    assert torch.equal(target.generate(**inputs, custom_generate=hook), plain)
    assert encoded == [1, 1]  # the stream, the file


def test_a_scene_is_encoded_once(drafter: EventDrafter, stream: EventStream, encoded: list[int]) -> None:
    first = drafter.see(stream)["event_features"]
    other = events(2, 64, 8)
    both = drafter.see([other, stream])["event_features"]
    assert torch.equal(both[1:], first)
    assert not torch.equal(both[0], both[1])
    assert encoded == [1, 1]
    drafter.see(stream, event_size="infer")
    pieces = [other.by_index(0, 50 + i) for i in range(MOST_SCENES)]
    drafter.see(pieces)
    drafter.see(pieces[-1])
    assert encoded == [1, 1, 1, MOST_SCENES]
    drafter.see(stream)  # least recently used, so dropped
    assert encoded[4:] == [1]


def test_a_changed_file_and_a_new_stream_are_encoded(
    drafter: EventDrafter, stream: EventStream, encoded: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "events.npz"
    save(path, stream)
    before = drafter.see(path)["event_features"]
    save(path, events(2, 64, 8))
    assert not torch.equal(drafter.see(path)["event_features"], before)
    for count in (10, 20, 30):  # objects of a moment may get each other's id
        drafter.see(stream.by_index(0, count))
    assert encoded == [1] * 5


def test_rows_of_events(drafter: EventDrafter, target: Any, stream: EventStream) -> None:
    inputs = asked(target, QUESTION, QUESTION) | {"do_sample": True, "seed": 1, "num_return_sequences": 2}
    plain = specfuse.generate(target, None, **inputs)
    two = [stream, events(2, 64, 8)]
    for form in (two, [two[0], two[0], two[1], two[1]], drafter.see(two)):
        assert torch.equal(specfuse.generate(target, drafter, events=form, **inputs), plain)
    with pytest.raises(ValueError, match="events hold 3 streams for 4 rows"):
        specfuse.generate(target, drafter, events=[stream] * 3, **inputs)


@pytest.mark.parametrize("other", ["lookup", None, "auto"])
def test_a_drafter_without_eyes_is_named(target: Any, stream: EventStream, other: str | None) -> None:
    with pytest.raises(ValueError, match=r"events: drafter (\w+) takes no events"):
        specfuse.generate(target, other, events=stream, **asked(target, QUESTION))


def test_a_combination_hands_events_on(drafter: EventDrafter, target: Any, stream: EventStream) -> None:
    text_model = specfuse.ModelDrafter(tiny_llama(vocab=400), depth=2)
    both = specfuse.CombinedDrafter([specfuse.PromptLookupDrafter(), drafter, text_model])
    inputs = asked(target, QUESTION)
    for given in ({"events": stream}, {"events": drafter.see(stream)}, {"draft_inputs": drafter.see(stream)}):
        assert torch.equal(specfuse.generate(target, both, **given, **inputs), target.generate(**inputs))


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (7, "events must be an EventStream, .* got int"),
        ([3], "events must be an EventStream, .* got list"),
        ({"event_features": [1.0]}, r"event_features must be a tensor \[B=1.* got list"),
        ({"pixel_values_events": [1.0]}, r"pixel_values_events must be a tensor .* got list"),
        ({"other": 1}, r"EventDrafter needs events: .* hold \['other'\]"),
    ],
)
def test_wrong_events(drafter: EventDrafter, target: Any, events: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specfuse.generate(target, drafter, events=events, **asked(target, QUESTION))


def test_missing_and_broken_files(drafter: EventDrafter, target: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file of events.*absent\.npz"):
        specfuse.generate(target, drafter, events=tmp_path / "absent.npz", **asked(target, QUESTION))
    (tmp_path / "text.npz").write_text("no events")
    with pytest.raises(ValueError, match=r"text\.npz is none of these formats"):
        specfuse.generate(target, drafter, events=str(tmp_path / "text.npz"), **asked(target, QUESTION))


def test_video_and_question(
    drafter: EventDrafter, target: Any, stream: EventStream, frames: np.ndarray
) -> None:
    processor = build_processor(a_tokenizer())
    asks = {"video": frames, "processor": processor, "question": QUESTION, **GREEDY}
    found = specfuse.generate(target, drafter=drafter, events=stream, **asks)
    text = f"USER: <video>\n{QUESTION} ASSISTANT:"
    inputs = processor(text=text, videos=[frames], return_tensors="pt")
    assert torch.equal(found, target.generate(**inputs, **GREEDY))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "question is missing: video, processor and question belong together"),
        ({"video": None}, "video is missing"),
        ({"processor": None}, "processor is missing"),
        ({"question": " "}, "question must be a non-empty string, got ' '"),
        ({"question": "<video>?"}, "question must not hold image or video placeholders"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int64)}, "input_ids and video are given"),
        ({"inputs": torch.ones(1, 3, dtype=torch.int64)}, "inputs and video are given"),
        ({"pixel_values_videos": torch.ones(1)}, "pixel_values_videos and video are given"),
        ({"video": np.zeros((8, 64, 64))}, r"video must be uint8 \[T, H, W, 3\]"),
    ],
)
def test_wrong_questions(target: Any, frames: np.ndarray, change: dict[str, Any], message: str) -> None:
    asks = {"video": frames, "processor": build_processor(a_tokenizer()), "question": QUESTION} | change
    with pytest.raises(ValueError, match=message):
        specfuse.generate(target, None, **asks, **GREEDY)


def test_a_session_sees_events_and_shows_pixels(
    drafter: EventDrafter, target: Any, stream: EventStream, encoded: list[int], frames: np.ndarray
) -> None:
    processor = build_processor(a_tokenizer())

    def answers(drafter: Any, **options: Any) -> list[list[int]]:
        session = specfuse.VideoSession(target, processor, frames, drafter, **options)
        first = session.ask(QUESTION, **GREEDY).tokens
        return [first, session.fork().ask("Is it raining?", **GREEDY).tokens]

    plain = answers(None)
    assert answers(drafter, events=stream) == plain
    assert encoded == [1]
    itself = specfuse.ModelDrafter(target, depth=4)
    session = specfuse.VideoSession(target, processor, frames, itself)
    for wanted in plain:  # drafting for itself, with the pixels in view, it is always right
        answer = session.ask(QUESTION if wanted is plain[0] else "Is it raining?", **GREEDY)
        assert answer.tokens == wanted
        assert answer.stats.accepted == answer.stats.drafted
