"""EventGPT against a plain statement of its equations, and as a citizen of Hugging Face and specfuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import finish, llama_config, random_prompts, tiny_llama
from torch.nn.functional import gelu, linear
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
)

import specfuse
from specfuse.data.world import clip, events
from specfuse.events import EventStream, render_eventgpt
from specfuse.models.eventgpt import EventGptConfig, EventGptForConditionalGeneration
from specfuse.models.eventgpt_processor import EventGptProcessor
from specfuse.train.tokenizer import train_tokenizer

SIZE, VOCABULARY, EVENT = 32, 128, 127
PICTURES = 3
GREEDY = {"max_new_tokens": 24, "do_sample": False}


def tiny_config(vocabulary: int = VOCABULARY, event: int = EVENT, **options: int) -> EventGptConfig:
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        projection_dim=24,
    )
    text = llama_config(vocab=vocabulary, hidden=48)
    options = {"num_event_images": PICTURES} | options
    return EventGptConfig(vision_config=vision, text_config=text, event_token_index=event, **options)


def tiny_model(seed: int = 0, **options: int) -> EventGptForConditionalGeneration:
    torch.manual_seed(seed)
    model = EventGptForConditionalGeneration(tiny_config(**options))
    return finish(model, seed, torch.float32, eos=False)


@pytest.fixture(scope="module")
def model() -> EventGptForConditionalGeneration:
    return tiny_model()


def a_batch(model: EventGptForConditionalGeneration, rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tokens = model.config.event_tokens
    before = torch.randint(3, EVENT, (rows, 4), generator=draw)
    after = torch.randint(3, EVENT, (rows, 6), generator=draw)
    ids = torch.cat([before, torch.full((rows, tokens), EVENT), after], 1)
    pixels = torch.randn((rows, PICTURES, 3, SIZE, SIZE), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_events": pixels}


def test_features_are_those_of_the_equations(model: EventGptForConditionalGeneration) -> None:
    pixels = a_batch(model)["pixel_values_events"]
    inner = model.model
    weights = dict(inner.named_parameters())
    for stream, found in zip(pixels, model.get_event_features(pixels), strict=True):
        pictures = []
        for picture in stream:
            hidden = inner.visual_tower(picture[None]).last_hidden_state[0]
            first = linear(hidden, weights["visual_projector.0.weight"], weights["visual_projector.0.bias"])
            projected = linear(
                gelu(first), weights["visual_projector.2.weight"], weights["visual_projector.2.bias"]
            )
            pictures.append(
                linear(projected, weights["feature_adaptor.weight"], weights["feature_adaptor.bias"])
            )
        temporal = [sum(tokens) / len(tokens) for tokens in pictures]
        spatial = [sum(p[i] for p in pictures) / len(pictures) for i in range(len(pictures[0]))]
        wanted = torch.stack([*temporal, *spatial])
        assert found.shape == (PICTURES + 17, 48)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_logits_are_those_of_llama_with_the_features_in_place(
    model: EventGptForConditionalGeneration,
) -> None:
    batch = a_batch(model)
    features = model.get_event_features(batch["pixel_values_events"])
    embed = model.get_input_embeddings()
    tokens = model.config.event_tokens
    ids = batch["input_ids"]
    whole = torch.cat([embed(ids[:, :4]), features, embed(ids[:, 4 + tokens :])], 1)
    wanted = model.lm_head(model.model.language_model(inputs_embeds=whole).last_hidden_state)
    found = model(**batch)
    torch.testing.assert_close(found.logits, wanted)
    torch.testing.assert_close(found.event_hidden_states, features)
    by_features = model(input_ids=ids, event_features=features).logits
    torch.testing.assert_close(by_features, wanted)
    other = model(**(batch | {"pixel_values_events": batch["pixel_values_events"].flip(1)})).logits
    assert (other - wanted).abs().max() > 1e-3


def test_loss_and_few_logits(model: EventGptForConditionalGeneration) -> None:
    batch = a_batch(model)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -5:] = batch["input_ids"][:, -5:]
    out = model(**batch, labels=labels)
    logits = out.logits[:, -6:-1].flatten(0, 1)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, labels[:, -5:].flatten()))
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, out.logits[:, -2:])


def test_the_published_sizes_are_the_defaults() -> None:
    config = EventGptConfig()
    assert (config.picture_tokens, config.event_tokens, config.context_length) == (577, 582, 2048)
    assert config.vision_config.hidden_size == 1024 and config.text_config.hidden_size == 4096
    with torch.device("meta"):
        model = EventGptForConditionalGeneration(config)
    assert 7.0e9 < sum(p.numel() for p in model.parameters()) < 7.3e9
    names = set(dict(model.model.named_parameters()))
    assert {"visual_projector.0.weight", "visual_projector.2.bias", "feature_adaptor.weight"} <= names


def test_generate_with_its_cache_is_generate_without(model: EventGptForConditionalGeneration) -> None:
    batch = a_batch(model)
    cached = model.generate(**batch, **GREEDY)
    assert cached.shape[1] == batch["input_ids"].shape[1] + 24
    assert torch.equal(cached, model.generate(**batch, **GREEDY, use_cache=False))
    one = {name: value[1:] for name, value in batch.items()}
    assert torch.equal(cached[1:], model.generate(**one, **GREEDY))
    other = model.generate(**(batch | {"pixel_values_events": batch["pixel_values_events"] + 1}), **GREEDY)
    assert not torch.equal(cached, other)


def test_as_target_of_specfuse(model: EventGptForConditionalGeneration) -> None:
    batch = a_batch(model)
    plain = model.generate(**batch, **GREEDY)
    same = specfuse.ModelDrafter(model, inputs=batch, depth=4)
    out = specfuse.generate(model, same, **batch, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)
    assert out.stats.tokens_per_pass > 3
    assert torch.equal(specfuse.generate(model, "auto", **batch, **GREEDY), plain)


def test_as_drafter_of_another_model(model: EventGptForConditionalGeneration) -> None:
    target = tiny_llama(seed=5)
    prompt = random_prompts(target, 2, seed=1)
    drafter = specfuse.ModelDrafter(model, inputs=a_batch(model), depth=3, branching=2)
    plain = target.generate(**prompt, **GREEDY)
    assert torch.equal(specfuse.generate(target, drafter, **prompt, **GREEDY), plain)


def test_save_and_load(model: EventGptForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is EventGptForConditionalGeneration
    assert AutoConfig.from_pretrained(tmp_path).event_tokens == model.config.event_tokens
    batch = a_batch(model)
    torch.testing.assert_close(again.eval()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("change", ["one place less", "a stream more", "no place", "4-d pixels", "both"])
def test_what_does_not_fit_is_named(model: EventGptForConditionalGeneration, change: str) -> None:
    batch = a_batch(model)
    match = {
        "one place less": r"row 0 of input_ids has 19 <event> tokens, a stream has 20",
        "a stream more": r"for 2 streams, got 3",
        "no place": r"for 0 streams, got 2",
        "4-d pixels": r"pixel_values_events must be \[S, n, 3, H, W\], got",
        "both": "exactly one of input_ids and inputs_embeds",
    }[change]
    if change == "one place less":
        batch["input_ids"][0, 4] = 5
    elif change == "a stream more":
        batch["pixel_values_events"] = torch.cat([batch["pixel_values_events"]] * 2)[:3]
    elif change == "no place":
        batch["input_ids"][batch["input_ids"] == EVENT] = 5
    elif change == "4-d pixels":
        batch["pixel_values_events"] = batch["pixel_values_events"][0]
    else:
        batch["inputs_embeds"] = torch.zeros(2, 30, 48)
    with pytest.raises(ValueError, match=match):
        model(**batch)


def test_no_pictures_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_event_images must be at least 1, got 0"):
        tiny_config(num_event_images=0)


# ------------------------------------------------------------------------------------------ processor


def a_processor(**options: object) -> EventGptProcessor:
    tokenizer = train_tokenizer(clip(1).questions, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<event>"]}, False)
    size = {"shortest_edge": SIZE}
    images = CLIPImageProcessor(size=size, crop_size={"height": SIZE, "width": SIZE})
    values = {"num_event_images": PICTURES, "event_tokens": PICTURES + 17} | options
    return EventGptProcessor(images, tokenizer, **values)


@pytest.fixture(scope="module")
def processor() -> EventGptProcessor:
    return a_processor()


@pytest.fixture(scope="module")
def stream() -> EventStream:
    return events(3, SIZE, 16)


def test_a_stream_is_its_pictures(processor: EventGptProcessor, stream: EventStream) -> None:
    text = processor.prompt("What is the weather like?")
    by_stream = processor(text=text, events=stream)
    pictures = render_eventgpt(stream, PICTURES)
    by_pictures = processor(text=[text], event_images=pictures)
    assert by_stream.keys() == by_pictures.keys()
    for name, value in by_stream.items():
        assert torch.equal(value, by_pictures[name]), name
    mean, deviation = (
        torch.tensor(v) for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    wanted = (torch.from_numpy(np.stack(pictures)) / 255 - mean) / deviation
    torch.testing.assert_close(by_stream["pixel_values_events"][0], wanted.movedim(-1, 1), atol=1e-5, rtol=0)


def test_a_picture_of_three_rows_is_no_picture_of_three_channels(processor: EventGptProcessor) -> None:
    picture = np.arange(3 * 20 * 3, dtype=np.uint8).reshape(3, 20, 3)
    found = processor(event_images=[picture] * 3)["pixel_values_events"]
    first = {"input_data_format": "channels_first", "return_tensors": "pt"}
    expected = processor.image_processor([picture.transpose(2, 0, 1)], **first)["pixel_values"]
    assert torch.equal(found[0, 0], expected[0])


def test_the_prompt_has_room_for_the_features(processor: EventGptProcessor, stream: EventStream) -> None:
    texts = [f"USER: <event>\n{question} ASSISTANT:" for question in ("Why?", "What is the weather like?")]
    inputs = processor(text=texts, events=[stream, stream])
    assert (inputs["input_ids"] == processor.event_token_id).sum(1).tolist() == [PICTURES + 17] * 2
    assert inputs["attention_mask"].sum(1).tolist() == sorted(inputs["attention_mask"].sum(1).tolist())
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][1].all()
    alone = processor(text=texts[:1], events=stream)["input_ids"][0]
    assert inputs["input_ids"][0].tolist()[-len(alone) :] == alone.tolist()
    decoded = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert decoded[1] == "USER: \nWhat is the weather like? ASSISTANT:"


def test_left_padding_does_not_change_answers(processor: EventGptProcessor, stream: EventStream) -> None:
    model = tiny_model(vocabulary=len(processor.tokenizer), event=processor.event_token_id)
    texts = [processor.prompt(question) for question in ("Why?", "What is the weather like?")]
    both = model.generate(**processor(text=texts, events=[stream, stream]), **GREEDY)
    for row, text in enumerate(texts):
        alone = model.generate(**processor(text=text, events=stream), **GREEDY)
        assert both[row, -24:].tolist() == alone[0, -24:].tolist()


@pytest.mark.parametrize("cut", [60, 10])
def test_a_prompt_is_cut_at_the_context(stream: EventStream, cut: int) -> None:
    short = a_processor(context_length=cut, conversation="{question} USER: <event> ASSISTANT:")
    question = "What is the weather like? " * 4
    inputs = short(text=short.prompt(question), events=stream)
    whole = a_processor(conversation="{question} USER: <event> ASSISTANT:")
    everything = whole(text=whole.prompt(question), events=stream)["input_ids"]
    assert everything.shape[1] > cut
    assert torch.equal(inputs["input_ids"], everything[:, :cut])
    model = tiny_model(vocabulary=len(short.tokenizer), event=short.event_token_id, context_length=cut)
    if not (inputs["input_ids"] == short.event_token_id).any():
        inputs.pop("pixel_values_events")
    assert model(**inputs).logits.shape[1] == cut


def test_processor_save_and_load(processor: EventGptProcessor, stream: EventStream, tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    text = processor.prompt("Where?")
    for again in (EventGptProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(again) is EventGptProcessor
        assert again.event_tokens == processor.event_tokens
        for name, value in processor(text=text, events=stream).items():
            assert torch.equal(again(text=text, events=stream)[name], value), name


def test_inputs_that_make_no_sense(processor: EventGptProcessor, stream: EventStream) -> None:
    with pytest.raises(ValueError, match="text has 1 <event> for 0 streams"):
        processor(text=processor.prompt("Why?"))
    with pytest.raises(ValueError, match=r"events must be EventStreams .*, got 'c'"):
        processor(text=processor.prompt("What?"), events="clip.npz")
    with pytest.raises(ValueError, match="not both"):
        processor(events=stream, event_images=render_eventgpt(stream, PICTURES))
    with pytest.raises(ValueError, match=r"event_images must be 3 for each stream, got \[4\]"):
        processor(event_images=render_eventgpt(stream, 4))
    with pytest.raises(ValueError, match="give text, events or event_images"):
        processor()
    with pytest.raises(ValueError, match="must hold"):
        a_processor(conversation="no place")
    with pytest.raises(ValueError, match="must know '<place>' as one token"):
        a_processor(event_token="<place>", conversation="{question} <place>")


def test_llama_config_from_a_dict() -> None:
    config = EventGptConfig(text_config={"hidden_size": 32, "vocab_size": 50})
    assert isinstance(config.text_config, LlamaConfig) and config.text_config.vocab_size == 50
