"""EventDrafter: events to the drafter, frames to the target, and the target's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import finish, random_prompts, tiny_llama
from transformers import PreTrainedTokenizerFast

import specfuse
from specfuse.data.world import clip, events
from specfuse.drafters.base import DraftState
from specfuse.drafters.event import EventDrafter
from specfuse.drafters.vocabulary import check_same_tokens
from specfuse.events import EventStream, render_eventgpt
from specfuse.models.checkpoint import load_draft_model
from specfuse.train.build import build_drafter, build_drafter_processor, build_model, build_processor
from specfuse.train.drafter import drafter_preset
from specfuse.train.presets import preset
from specfuse.train.tokenizer import PROMPT, train_tokenizer

GREEDY = {"max_new_tokens": 24, "do_sample": False}
QUESTION = "What is the weather like?"


def a_tokenizer(index: int = 1, *more: str) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(clip(index).questions, 400)
    tokenizer.add_tokens(list(more), special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def drafter() -> EventDrafter:
    tokenizer = a_tokenizer(1, "<event>")
    model = build_drafter(drafter_preset(preset("micro")), tokenizer, 0)
    model = finish(model, 1, torch.float32, eos=False)
    return EventDrafter(model, build_drafter_processor(model, tokenizer), a_tokenizer(), depth=4)


@pytest.fixture(scope="module")
def target() -> Any:
    return finish(build_model(preset("micro"), a_tokenizer(), 0), 2, torch.float32, eos=False)


@pytest.fixture(scope="module")
def stream() -> EventStream:
    return events(1, 64, 8)


def asked(target: Any, *questions: str) -> dict[str, Any]:
    processor = build_processor(a_tokenizer())
    frames = np.random.default_rng(0).integers(0, 255, (len(questions), 8, 64, 64, 3), dtype=np.uint8)
    text = [PROMPT.format(question=question) for question in questions]
    inputs = processor(text=text, videos=list(frames), padding=True, return_tensors="pt")
    return {**inputs, **GREEDY}


def state_of(prompts: list[list[int]], visual: set[int], draft_inputs: Any) -> DraftState:
    return DraftState(
        prompts=prompts,
        answers=[[] for _ in prompts],
        active=[True] * len(prompts),
        remaining=[9] * len(prompts),
        visual_token_ids=frozenset(visual),
        draft_inputs=draft_inputs,
    )


def test_the_prompt_is_the_processors_own(drafter: EventDrafter, target: Any, stream: EventStream) -> None:
    ids = asked(target, QUESTION)["input_ids"][0].tolist()
    state = state_of([ids], {target.config.video_token_index}, drafter.see(stream))
    own = drafter.own_inputs(state)
    wanted = drafter.processor(text=drafter.processor.prompt(QUESTION), events=stream)
    assert torch.equal(own["input_ids"], wanted["input_ids"])
    features = drafter.model.get_event_features(wanted["pixel_values_events"])
    torch.testing.assert_close(own["event_features"], features)


def test_without_frames_events_come_first(drafter: EventDrafter, stream: EventStream) -> None:
    count = drafter.model.config.event_tokens
    event = drafter.model.config.event_token_index
    state = state_of([[1, 7, 9], [8]], set(), drafter.see([stream, stream]))
    own = drafter.own_inputs(state)
    assert own["input_ids"].tolist() == [[1, *[event] * count, 7, 9], [0, 0, *[event] * count, 8]]
    assert own["attention_mask"].sum(1).tolist() == [count + 3, count + 1]


@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_are_the_targets(drafter: EventDrafter, target: Any, stream: EventStream, rows: int) -> None:
    inputs = asked(target, *[QUESTION, "Is there a red car on the left?"][:rows])
    plain = target.generate(**inputs)
    seen = drafter.see([stream] * rows)
    assert torch.equal(specfuse.generate(target, drafter, draft_inputs=seen, **inputs), plain)
    images = render_eventgpt(stream, 5)
    by_pictures = {"pixel_values_events": drafter.processor.pixels(event_images=images)}
    assert torch.equal(specfuse.generate(target, drafter, draft_inputs=by_pictures, **inputs), plain)


def test_the_drafter_sees_what_it_would_alone(drafter: EventDrafter, stream: EventStream) -> None:
    """With the drafter's own answer for an oracle: its first draft is its own greedy answer."""
    inputs = drafter.processor(text=drafter.processor.prompt(QUESTION), events=stream)
    alone = drafter.model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
    prompt = a_tokenizer()(PROMPT.format(question=QUESTION)).input_ids
    video = a_tokenizer().convert_tokens_to_ids("<video>")
    tree = drafter.propose(state_of([prompt], {video}, drafter.see(stream)), 16)
    assert tree.tokens[0, 1:].tolist() == alone[:4]
    blind = {"event_features": -drafter.see(stream)["event_features"]}
    other = drafter.propose(state_of([prompt], {video}, blind), 16)
    assert other.tokens[0, 1:].tolist() != alone[:4]


def test_fixed_inputs(drafter: EventDrafter, target: Any, stream: EventStream) -> None:
    fixed = EventDrafter(drafter.model, drafter.processor, a_tokenizer(), inputs=drafter.see(stream))
    inputs = asked(target, QUESTION)
    assert torch.equal(specfuse.generate(target, fixed, **inputs), target.generate(**inputs))


def test_events_repeat_with_their_rows(drafter: EventDrafter, target: Any, stream: EventStream) -> None:
    inputs = asked(target, QUESTION, QUESTION) | {"do_sample": True, "seed": 1, "num_return_sequences": 2}
    fast = specfuse.generate(target, drafter, draft_inputs=drafter.see([stream] * 2), **inputs)
    assert torch.equal(fast, specfuse.generate(target, None, **inputs))


@pytest.mark.parametrize("how", ["list", "flat", "narrow", "few", "ids"])
def test_wrong_events_are_named(drafter: EventDrafter, target: Any, stream: EventStream, how: str) -> None:
    right = drafter.see(stream)["event_features"]
    wrong = {"list": right.tolist(), "flat": right[0], "narrow": right[..., 1:], "few": right[:, :0]}
    given = {"input_ids": [1, 2]} if how == "ids" else {"event_features": wrong[how]}
    name = "input_ids" if how == "ids" else "event_features"
    with pytest.raises(ValueError, match=rf"{name} must be a tensor \[B=1.* got "):
        specfuse.generate(target, drafter, draft_inputs=given, **asked(target, QUESTION))


def test_what_can_not_be_drafted_with(drafter: EventDrafter, target: Any, stream: EventStream) -> None:
    inputs = asked(target, QUESTION)
    with pytest.raises(ValueError, match=r"EventDrafter needs events: .* hold nothing"):
        specfuse.generate(target, drafter, **inputs)
    with pytest.raises(ValueError, match=r"hold \['pixels'\]"):
        specfuse.generate(target, drafter, draft_inputs={"pixels": torch.zeros(1)}, **inputs)
    with pytest.raises(ValueError, match="events hold 3 streams for 1 rows"):
        specfuse.generate(target, drafter, draft_inputs=drafter.see([stream] * 3), **inputs)
    with pytest.raises(ValueError, match="either events or event_images"):
        drafter.see()
    with pytest.raises(ValueError, match="must be an EventGptForConditionalGeneration, got LlamaForCausalLM"):
        EventDrafter(tiny_llama(), drafter.processor, a_tokenizer())


def test_tokenizers_are_compared() -> None:
    mine, its = a_tokenizer(1), a_tokenizer(1, "<event>")
    check_same_tokens(mine, its)
    check_same_tokens(a_tokenizer(1, "<placeholder>"), its)
    with pytest.raises(ValueError, match=r"tokens are others to the drafter, first '.+': \d+ to the target"):
        check_same_tokens(a_tokenizer(2), its)
    mine.add_tokens(["<end>"], special_tokens=True)
    check_same_tokens(mine, its)
    mine.eos_token = "<end>"
    with pytest.raises(ValueError, match="first '<end>': 400 to the target, None to the drafter"):
        check_same_tokens(mine, its)


@pytest.mark.parametrize("kind", ["auto", "intersection", "string"])
def test_another_vocabulary(drafter: EventDrafter, target: Any, stream: EventStream, kind: str) -> None:
    other = EventDrafter(drafter.model, drafter.processor, a_tokenizer(2), vocabulary=kind)
    assert other.vocabulary.kind == ("intersection" if kind == "auto" else kind)
    prompt = a_tokenizer(2)(PROMPT.format(question=QUESTION)).input_ids
    state = state_of([prompt], {a_tokenizer(2).convert_tokens_to_ids("<video>")}, other.see(stream))
    if kind == "string":  # the intersection goes token by token
        wanted = drafter.processor(text=drafter.processor.prompt(QUESTION), events=stream)
        assert torch.equal(other.own_inputs(state)["input_ids"], wanted["input_ids"])
    model = tiny_llama(seed=3, vocab=400)
    prompt = random_prompts(model, 2)
    found = specfuse.generate(model, other, events=stream, **prompt, **GREEDY)
    assert torch.equal(found, model.generate(**prompt, **GREEDY))


def test_a_text_model_is_drafted_for(drafter: EventDrafter, stream: EventStream) -> None:
    model = tiny_llama(seed=3, vocab=400)
    prompt = random_prompts(model, 2)
    found = specfuse.generate(model, drafter, draft_inputs=drafter.see(stream), **prompt, **GREEDY)
    assert torch.equal(found, model.generate(**prompt, **GREEDY))


def test_it_is_not_loaded_as_a_model_that_needs_no_events(drafter: EventDrafter, tmp_path: Path) -> None:
    drafter.model.config.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds an EventGPT: it drafts from events, with specfuse\.EventDrafter"
    ):
        load_draft_model(tmp_path)
