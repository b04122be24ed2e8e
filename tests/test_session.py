"""A conversation about one video gives the answers of `model.generate` on all of it, uncached."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_llama
from transformers import AutoProcessor, VideoLlavaForConditionalGeneration
from vision_probe import count_work

from specfuse.drafters import ModelDrafter
from specfuse.hf.cache_names import GENERATE_CACHE
from specfuse.passes.shared_prefix import SharedPrefix
from specfuse.session import Answer, VideoSession, load_frames
from specfuse.stream import AnswerStream
from specfuse.vision.cache import patched

NEW = 12


@pytest.fixture(scope="module")
def processor(tiny_directory: Path) -> Any:
    return AutoProcessor.from_pretrained(tiny_directory)


@pytest.fixture
def model(tiny_directory: Path) -> Any:
    return VideoLlavaForConditionalGeneration.from_pretrained(tiny_directory).eval()


def clip(seed: int = 0, frames: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 60, 72, 3), dtype=np.uint8)


def uncached_answer(model: Any, processor: Any, session: VideoSession, answer: Answer) -> list[int]:
    """What `model.generate` says after everything up to `answer`, pixels included."""
    assert session.input_ids is not None
    ids = session.input_ids[:, : session.input_ids.shape[1] - len(answer.tokens)]
    pixels = processor(text="<video>", videos=[clip()], return_tensors="pt")["pixel_values_videos"]
    mask = torch.ones_like(ids)
    out = model.generate(input_ids=ids, attention_mask=mask, pixel_values_videos=pixels, max_new_tokens=NEW)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("drafter", [None, "lookup", "auto"])
def test_conversation_equals_uncached_generate(model: Any, processor: Any, drafter: str | None) -> None:
    session = VideoSession(model, processor, clip(), drafter)
    prompt = "USER: <video>\nWhat is happening? ASSISTANT:"
    inputs = processor(text=prompt, videos=[clip()], return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=NEW)
    first = session.ask("What is happening?", max_new_tokens=NEW)
    assert torch.equal(session.input_ids, expected)
    assert first.tokens == expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert first == processor.tokenizer.decode(first.tokens, skip_special_tokens=True).strip()
    for question in ("Is it raining?", "How many cars are there?"):
        answer = session.ask(question, max_new_tokens=NEW)
        assert answer.tokens == uncached_answer(model, processor, session, answer)
        text = processor.tokenizer.decode(session.input_ids[0])
        assert f" USER: {question} ASSISTANT:" in text
    assert [question for question, _ in session.history] == [
        "What is happening?",
        "Is it raining?",
        "How many cars are there?",
    ]


def test_video_is_encoded_once_and_no_token_is_forwarded_twice(model: Any, processor: Any) -> None:
    session = VideoSession(model, processor, clip(), None)
    early = session.fork()
    with count_work(model) as work:
        for question in ("What is happening?", "Is it raining?"):
            session.ask(question, max_new_tokens=NEW)
        branch = session.fork()
        branch.ask("Why?", max_new_tokens=NEW)
        early.ask("Where is it?", max_new_tokens=NEW)
    assert (work.tower_calls, work.frames) == (1, 4)
    # Each token is forwarded once, except for the one behind the prefix; an answer's last token waits for
    # the next question. `early` and `branch` add their own tails.
    prefix = int((session.input_ids == processor.video_token_id).nonzero()[:, 1].max()) + 1
    shared = branch.input_ids.shape[1] - 1
    alone = early.input_ids.shape[1] - 1 - prefix
    assert sum(tokens for _, tokens in work.passes) == shared + 1 + alone


def test_kv_of_other_weights_is_not_used(model: Any, processor: Any) -> None:
    session = VideoSession(model, processor, clip())
    session.ask("What is this?", max_new_tokens=6, do_sample=False)
    stale = session.fork().ask("And now?", max_new_tokens=NEW, do_sample=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    branch = session.fork()
    answer = branch.ask("And now?", max_new_tokens=NEW, do_sample=False)
    assert answer.tokens == uncached_answer(model, processor, branch, answer)
    assert answer.tokens != stale.tokens
    assert session.ask_many(["And now?"], max_new_tokens=NEW, do_sample=False)[0].tokens == answer.tokens
    fresh = VideoSession(model, processor, clip()).ask("Why?", max_new_tokens=NEW, do_sample=False)
    old = VideoSession(model, processor, clip())
    old._video = session._video
    assert old.ask("Why?", max_new_tokens=NEW, do_sample=False).tokens == fresh.tokens


@pytest.mark.filterwarnings("ignore:decoding plainly")
def test_a_session_that_is_decoded_plainly(model: Any, processor: Any) -> None:
    # A window that LLaMA's masks do not show and its cache applies.
    model.config.text_config.sliding_window = 16
    session = VideoSession(model, processor, clip())
    for question in ("What is this?", "And now?", "Why?"):
        answer = session.ask(question, max_new_tokens=NEW)
        assert "a window of 16 tokens" in answer.stats.drafting_stopped
        assert answer.tokens == uncached_answer(model, processor, session, answer)


def test_stop_strings_of_the_generation_config(model: Any, processor: Any) -> None:
    free = VideoSession(model, processor, clip()).ask("What is this?", max_new_tokens=NEW)
    middle = processor.tokenizer.decode(free.tokens[3:4])
    model.generation_config.stop_strings = [middle]
    stopped = VideoSession(model, processor, clip()).ask("What is this?", max_new_tokens=NEW)
    assert 1 <= len(stopped.tokens) <= 4 and stopped.tokens == free.tokens[: len(stopped.tokens)]
    assert model.generation_config.stop_strings == [middle]


def test_forks_are_independent(model: Any, processor: Any) -> None:
    session = VideoSession(model, processor, clip(), "lookup")
    session.ask("What is happening?", max_new_tokens=NEW)
    branch, other = session.fork(), session.fork()
    mine = branch.ask("Is it raining?", max_new_tokens=NEW)
    theirs = other.ask("How many cars?", max_new_tokens=NEW)
    again = session.ask("Is it raining?", max_new_tokens=NEW)
    for s, answer in ((branch, mine), (other, theirs), (session, again)):
        assert answer.tokens == uncached_answer(model, processor, s, answer)
    assert again.tokens == mine.tokens
    assert (len(session.history), len(branch.history), len(other.history)) == (2, 2, 2)


def test_forks_in_threads(model: Any, processor: Any) -> None:
    root = VideoSession(model, processor, clip(), None)
    forks = [root.fork() for _ in range(4)]
    answers: dict[int, Answer] = {}

    def ask(i: int) -> None:
        answers[i] = forks[i].ask(f"Question {i % 2}?", max_new_tokens=NEW)

    with count_work(model) as work:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert work.tower_calls == 1
    for i, fork in enumerate(forks):
        assert answers[i].tokens == uncached_answer(model, processor, fork, answers[i])


def test_patched_model_shares_the_clip_between_sessions(model: Any, processor: Any) -> None:
    with patched(model) as cache, count_work(model) as work:
        answers = [
            VideoSession(model, processor, clip(), None).ask("Why?", max_new_tokens=NEW) for _ in range(2)
        ]
    assert work.tower_calls == 1
    assert (cache.stats.misses, cache.stats.hits) == (1, 1)
    assert answers[0] == answers[1]


def test_a_failing_question_leaves_the_conversation(model: Any, processor: Any) -> None:
    session = VideoSession(model, processor, clip(), None)
    session.ask("What is happening?", max_new_tokens=NEW)
    before = (session.input_ids, session.history)

    def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken processor")

    with pytest.raises(RuntimeError, match="broken"):
        session.ask("Is it raining?", max_new_tokens=NEW, logits_processor=[broken])
    assert (session.input_ids, session.history) == before
    answer = session.ask("Is it raining?", max_new_tokens=NEW)
    assert answer.tokens == uncached_answer(model, processor, session, answer)


def test_answer_that_stops_is_continued_behind_its_end_token(model: Any, processor: Any) -> None:
    session = VideoSession(model, processor, clip(), None)
    reference = session.fork().ask("What is happening?", max_new_tokens=NEW)
    stop = reference.tokens[4]
    stopped = session.ask("What is happening?", max_new_tokens=NEW, eos_token_id=stop)
    assert stopped.tokens == reference.tokens[: reference.tokens.index(stop) + 1]
    answer = session.ask("Why?", max_new_tokens=NEW)
    assert answer.tokens == uncached_answer(model, processor, session, answer)


def test_other_templates(model: Any, processor: Any) -> None:
    session = VideoSession(
        model,
        processor,
        clip(),
        None,
        first_turn="System text. USER: <video>{question} ASSISTANT:",
        next_turn="</s>USER: {question} ASSISTANT:",
    )
    session.ask("Braces {} and {question}?", max_new_tokens=NEW)
    answer = session.ask("Why?", max_new_tokens=NEW)
    assert answer.tokens == uncached_answer(model, processor, session, answer)
    text = processor.tokenizer.decode(session.input_ids[0])
    assert text.startswith("<s>System text. USER: <video>") and "</s>USER: Why? ASSISTANT:" in text
    assert "Braces {} and {question}?" in text


def test_answer_is_a_string_that_copies_and_pickles(model: Any, processor: Any) -> None:
    answer = VideoSession(model, processor, clip(), None).ask("Why?", max_new_tokens=NEW)
    assert isinstance(answer, str) and answer.stats.tokens == len(answer.tokens) == NEW
    for twin in (copy.copy(answer), copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):
        assert (twin, twin.tokens, twin.stats) == (answer, answer.tokens, answer.stats)
        assert type(twin) is Answer


def test_every_form_of_video_gives_the_same_frames() -> None:
    frames = clip()
    forms = [
        frames,
        torch.from_numpy(frames),
        list(frames),
        tuple(Image.fromarray(frame) for frame in frames),
    ]
    for form in forms:
        assert np.array_equal(load_frames(form), frames)


def test_video_file(model: Any, processor: Any, shared_data: Path) -> None:
    path = shared_data / "gota_slomo.gif"
    session = VideoSession(model, processor, str(path), None, num_frames=3)
    with count_work(model) as work:
        session.ask("What is it?", max_new_tokens=2)
    assert work.frames == 3


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), r"float32 \[4, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), r"\[8, 8, 3\]"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"\[4, 3, 8, 8\]"),
        ([], "at least one frame"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "one shape"),
    ],
)
def test_bad_videos_are_named(video: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_frames(video)


def test_bad_requests_are_named(model: Any, processor: Any) -> None:
    session = VideoSession(model, processor, clip(), None)
    with pytest.raises(ValueError, match="question"):
        session.ask("  ")
    with pytest.raises(ValueError, match="placeholders"):
        session.ask("What about <video>?")
    with pytest.raises(ValueError, match=GENERATE_CACHE):
        session.ask("Why?", **{GENERATE_CACHE: None})
    with pytest.raises(ValueError, match=r"num_return_sequences must be 1.*3"):
        session.ask("Why?", num_return_sequences=3)
    with pytest.raises(ValueError, match="num_beams"):
        session.ask("Why?", num_beams=2)
    assert session.input_ids is None
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        VideoSession(tiny_llama(), processor, clip())
    for templates in ({"first_turn": "{question}"}, {"first_turn": "{question}<video>"}, {"next_turn": "x"}):
        with pytest.raises(ValueError, match=next(iter(templates))):
            VideoSession(model, processor, clip(), **templates)
    with pytest.raises(FileNotFoundError):
        VideoSession(model, processor, "no_such_file.mp4")


QUESTIONS = [
    "Is it raining?",
    "What?",
    "How many cars are there in all?",
    "Is it raining?",
    "Why is that so?",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("drafter", "batch_size"), [(None, 2), ("lookup", 8), ("model", 3)])
def test_ask_many_answers_as_separate_forks_do(
    model: Any, processor: Any, dtype: torch.dtype, drafter: Any, batch_size: int
) -> None:
    model = model.to(dtype)
    drafter = ModelDrafter(model, depth=3) if drafter == "model" else drafter
    session = VideoSession(model, processor, clip(), drafter)
    for options in ({}, {"do_sample": True, "temperature": 1.5}):
        separate = [
            session.fork().ask(q, max_new_tokens=NEW, seed=7 + i, **options).tokens
            for i, q in enumerate(QUESTIONS)
        ]
        together = session.ask_many(QUESTIONS, batch_size=batch_size, max_new_tokens=NEW, seed=7, **options)
        assert [answer.tokens for answer in together] == separate
        assert together[0] == processor.tokenizer.decode(separate[0], skip_special_tokens=True).strip()
        assert together[0].stats.tokens == len(separate[0])
    # The conversation goes on where it was, and ask_many from there.
    assert session.history == () and session.input_ids is None
    session.ask("What is happening?", max_new_tokens=NEW)
    separate = [session.fork().ask(question, max_new_tokens=NEW).tokens for question in QUESTIONS]
    together = session.ask_many(QUESTIONS, batch_size=batch_size, max_new_tokens=NEW)
    assert [answer.tokens for answer in together] == separate


def test_ask_many_keeps_the_video_once(model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = AnswerStream._step

    def watched(self: AnswerStream) -> Any:
        sizes.append(self.pool.kv_bytes)
        return step(self)

    monkeypatch.setattr(AnswerStream, "_step", watched)
    session = VideoSession(model, processor, clip(), None)
    shared = session.ask_many(QUESTIONS, max_new_tokens=NEW)
    kept_once = max(sizes)
    sizes.clear()
    monkeypatch.setattr("specfuse.session._shareable", lambda model, kv: None)
    assert session.ask_many(QUESTIONS, max_new_tokens=NEW) == shared
    video = SharedPrefix(list(session._video._kv.values())).kv_bytes
    assert max(sizes) - kept_once > 6 * video, "eight rows would keep eight"


def test_ask_many_encodes_the_video_once_and_works_with_eager_attention(model: Any, processor: Any) -> None:
    session = VideoSession(model, processor, clip(), None)
    with count_work(model) as work:
        expected = session.ask_many(QUESTIONS, max_new_tokens=NEW)
    assert work.tower_calls == 1
    model.set_attn_implementation("eager")
    assert VideoSession(model, processor, clip(), None).ask_many(QUESTIONS, max_new_tokens=NEW) == expected


@pytest.mark.parametrize(
    ("questions", "kwargs", "message"),
    [
        ("one?", {}, "questions must be a sequence of strings"),
        (["a?", 3], {}, "questions must be a sequence of strings"),
        (["a?", " "], {}, "question must be a non-empty string"),
        (["a?"], {"streamer": object()}, "streamer"),
        (["a?"], {"input_ids": None}, "input_ids is set by the session"),
        (["a?", "b?"], {"seed": [1]}, "seed must be an int or 2 ints"),
        (["a?"], {"batch_size": 0}, "batch_size"),
        (["a?"], {"num_beams": 2}, "num_beams"),
    ],
)
def test_ask_many_names_bad_requests(
    model: Any, processor: Any, questions: Any, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        VideoSession(model, processor, clip(), None).ask_many(questions, **kwargs)


def test_ask_many_without_questions_has_no_answers(model: Any, processor: Any) -> None:
    assert VideoSession(model, processor, clip(), None).ask_many([]) == []
