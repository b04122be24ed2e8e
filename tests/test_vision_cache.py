"""A clip already seen costs no tower call and no prefill of its prefix, and changes no answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import (
    image_inputs,
    left_pad,
    random_clip,
    random_prompts,
    random_text,
    tiny_video_llava,
    tokens_per_frame,
    video_inputs,
)
from torch import Tensor
from transformers import DynamicCache, StaticCache
from vision_probe import count_work

import specfuse
from specfuse.hf.cache_names import GENERATE_CACHE, output_cache
from specfuse.vision.cache import VisionCache, patched

NEW = 10


def answer(model: Any, inputs: dict[str, Tensor], how: str = "plain", **kwargs: Any) -> Tensor:
    """Greedy answer of `model.generate` ("plain") or of `specfuse.generate` with a drafter, [B, S + NEW]."""
    kwargs = {"max_new_tokens": NEW, "do_sample": False} | kwargs
    if how == "plain":
        return model.generate(**inputs, **kwargs)
    return specfuse.generate(model, None if how == "none" else how, max_nodes=8, **inputs, **kwargs)


def assert_same_with_cache(
    model: Any, *requests: dict[str, Tensor], how: str = "plain", **kwargs: Any
) -> Any:
    """Asks every request uncached, then all of them, twice, through one cache; returns that cache."""
    expected = [model.generate(**r, max_new_tokens=NEW, do_sample=False) for r in requests]
    with patched(model) as cache:
        for _ in range(2):
            for request, wanted in zip(requests, expected, strict=True):
                got = answer(model, request, how, **kwargs)
                assert torch.equal(got, wanted), f"{got.tolist()} is not {wanted.tolist()}"
    return cache


@pytest.mark.parametrize("how", ["plain", "none", "lookup"])
def test_second_question_forwards_only_the_question(how: str) -> None:
    model = tiny_video_llava(seed=1, eos=False)
    first = video_inputs(model, frames=4, seed=1, text_lens=[6])
    second = video_inputs(model, frames=4, seed=1, text_lens=[9], question_seed=77)
    expected = [answer(model, first), answer(model, second)]
    prompt = first["input_ids"].shape[1]
    with patched(model) as cache, count_work(model) as work:
        assert torch.equal(answer(model, first, how), expected[0])
        assert (work.tower_calls, work.frames) == (1, 4)
        assert work.first_pass[1] >= prompt  # a draft tree may ride behind the prompt
        work.reset()
        assert torch.equal(answer(model, second, how), expected[1])
        assert work.tower_calls == 0
        drafted = work.first_pass[1] - 9
        assert 0 <= drafted <= 8 and (how == "lookup" or drafted == 0)
    assert (cache.stats.hits, cache.stats.misses, cache.stats.bypassed) == (1, 1, 0)


def test_uncached_model_encodes_every_time() -> None:
    """The probe itself can see the tower: without a patch each question calls it."""
    model = tiny_video_llava()
    with count_work(model) as work:
        for _ in range(2):
            answer(model, video_inputs(model))
    assert work.tower_calls == 2


# transformers' own eager attention is NaN on left-padded rows in float64: its softmax works in float32, where
# the mask's -1.8e308 is -inf.
@pytest.mark.parametrize(
    ("attention", "dtype"), [("sdpa", torch.float32), ("sdpa", torch.float64), ("eager", torch.float32)]
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", [0, 5])
def test_answers_equal_uncached(batch: int, dtype: torch.dtype, attention: str, seed: int) -> None:
    model = tiny_video_llava(seed=seed, dtype=dtype, eos=False, attn_implementation=attention)
    requests = [
        video_inputs(model, batch, seed=seed),
        video_inputs(model, batch, seed=seed, question_seed=50, text_lens=[11, 4, 7][:batch]),
        image_inputs(model, batch, seed=seed),
    ]
    cache = assert_same_with_cache(model, *requests)
    assert (cache.stats.misses, cache.stats.hits) == (2 * batch, 4 * batch)


@pytest.mark.parametrize("how", ["none", "lookup"])
@pytest.mark.parametrize("batch", [1, 3])
def test_answers_equal_uncached_in_our_loop(how: str, batch: int) -> None:
    model = tiny_video_llava(seed=3, dtype=torch.float64)
    requests = [
        video_inputs(model, batch, seed=3),
        video_inputs(model, batch, seed=3, question_seed=8, clips=[0] * batch),
    ]
    cache = assert_same_with_cache(model, *requests, how=how)
    assert cache.stats.misses == batch


def test_logits_equal_uncached() -> None:
    model = tiny_video_llava(dtype=torch.float64)
    options = {"max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    inputs = video_inputs(model, 3, question_seed=4)
    plain = model.generate(**inputs, **options)
    with patched(model):
        model.generate(**video_inputs(model, 3), max_new_tokens=1)
        cached = model.generate(**inputs, **options)
    for mine, reference in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)
    for mine, reference in zip(output_cache(cached).layers, output_cache(plain).layers, strict=True):
        keep = inputs["attention_mask"].bool()[:, None, :, None]
        keep = torch.nn.functional.pad(keep, (0, 0, 0, mine.keys.shape[2] - keep.shape[2]), value=True)
        torch.testing.assert_close(mine.keys * keep, reference.keys * keep, rtol=0, atol=1e-12)
        torch.testing.assert_close(mine.values * keep, reference.values * keep, rtol=0, atol=1e-12)


def test_same_clip_several_times_in_one_batch_is_encoded_once() -> None:
    model = tiny_video_llava(eos=False)
    inputs = video_inputs(model, 4, text_lens=[4, 9, 6, 4], clips=[0, 1, 0, 0])
    expected = answer(model, inputs)
    with patched(model) as cache, count_work(model) as work:
        assert torch.equal(answer(model, inputs), expected)
    assert work.frames == 8
    assert (cache.stats.misses, cache.stats.hits) == (2, 2)


def mixed_rows(model: Any) -> dict[str, Tensor]:
    """A clip, plain text, two clips, an image and a clip: rows with their own padding and prefix ends."""
    generator = torch.Generator().manual_seed(3)
    video = [model.config.video_token_index] * (2 * tokens_per_frame(model))
    image = [model.config.image_token_index] * tokens_per_frame(model, video=False)

    def text(length: int) -> list[int]:
        return random_text(model, length, generator)

    rows = [
        [1, *video, *text(9)],
        [1, *text(5)],
        [1, *text(2), *video, *text(3), *video, *text(4)],
        [1, *image, *text(2), *video, *text(3)],
    ]
    clips = torch.stack([random_clip(model, 2, i) for i in range(4)])
    keyword = next(k for k in image_inputs(model) if k.startswith("pixel_values"))
    return {**left_pad(rows), "pixel_values_videos": clips, keyword: random_clip(model, 1, 40)}


def test_rows_of_different_kinds_share_a_batch() -> None:
    model = tiny_video_llava(seed=2, dtype=torch.float64, eos=False)
    mixed = mixed_rows(model)
    one = {
        "input_ids": mixed["input_ids"][:1, mixed["attention_mask"][0].argmax() :],
        "pixel_values_videos": mixed["pixel_values_videos"][:1],
    }
    expected_one, expected = answer(model, one), answer(model, mixed)
    with patched(model) as cache, count_work(model) as work:
        assert torch.equal(answer(model, one), expected_one)  # so that one row hits and two rows miss below
        assert torch.equal(answer(model, mixed), expected)
        assert (cache.stats.hits, cache.stats.misses) == (1, 3)
        work.reset()
        assert torch.equal(answer(model, mixed), expected)
        assert work.tower_calls == 0
    assert (cache.stats.hits, cache.stats.misses, cache.stats.bypassed) == (4, 3, 0)


def test_padding_of_a_single_row_is_kept() -> None:
    model = tiny_video_llava(dtype=torch.float64, eos=False)
    inputs = video_inputs(model, 2, text_lens=[3, 9])
    row = {name: value[:1] for name, value in inputs.items()}
    assert row["attention_mask"][0, 0] == 0
    cache = assert_same_with_cache(model, row)
    assert cache.stats.hits == 1


def test_text_prompts_pass_through_uncounted() -> None:
    model = tiny_video_llava()
    cache = assert_same_with_cache(model, random_prompts(model, 2))
    assert cache.stats == VisionCache().stats


@pytest.mark.parametrize("batch", [1, 2])
def test_static_cache(batch: int) -> None:
    model = tiny_video_llava(eos=False)
    cache = assert_same_with_cache(model, video_inputs(model, batch), cache_implementation="static")
    assert cache.stats.hits == batch
    inputs = video_inputs(model, batch)
    expected = answer(model, inputs)
    with patched(model, cache):
        past = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        assert torch.equal(answer(model, inputs, **{GENERATE_CACHE: past}), expected)
    assert cache.stats.hits == 2 * batch


def test_sampling_beams_and_several_sequences() -> None:
    model = tiny_video_llava()
    inputs = video_inputs(model)
    for options in (
        {"do_sample": True, "temperature": 1.3},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
    ):
        torch.manual_seed(7)
        expected = model.generate(**inputs, max_new_tokens=NEW, **options)
        with patched(model) as cache:
            for _ in range(2):
                torch.manual_seed(7)
                assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, **options), expected)
        assert cache.stats.misses == 1


def tree_call(model: Any, form: str, batch: int = 2) -> tuple[dict[str, Any], int]:
    """A prefill with three draft nodes behind the prompt: two siblings under the last token, one child."""
    inputs = video_inputs(model, batch)
    ids = torch.cat([inputs["input_ids"], torch.tensor([[9, 10, 11]]).repeat(batch, 1)], dim=1)
    length, real = inputs["input_ids"].shape[1], inputs["attention_mask"].bool()
    mask = torch.ones(length + 3, length + 3, dtype=torch.bool).tril().repeat(batch, 1, 1)
    mask[:, :, :length] &= real[:, None]
    mask |= torch.eye(length + 3, dtype=torch.bool)
    mask[:, length + 1, length] = mask[:, length + 2, length + 1] = False
    depth = (real.cumsum(1) - 1).clamp(min=0)
    last = depth[:, -1:]
    mask = mask[:, None]
    if form == "additive":
        mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    call = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.cat([depth, last + 1, last + 1, last + 2], dim=1),
        "pixel_values_videos": inputs["pixel_values_videos"],
        "logits_to_keep": 4,
        "use_cache": True,
    }
    return call, length


@pytest.mark.parametrize("form", ["bool", "additive"])
@pytest.mark.parametrize("keep", ["int", "index", "negative index"])
def test_draft_tree_behind_the_prompt(form: str, keep: str) -> None:
    model = tiny_video_llava(
        dtype=torch.float64, attn_implementation="eager" if form == "additive" else "sdpa"
    )
    call, length = tree_call(model, form)
    if keep != "int":
        call["logits_to_keep"] = torch.arange(4) + (length - 1 if keep == "index" else -4)
    with torch.no_grad():
        expected = model(**call, **{GENERATE_CACHE: DynamicCache()})
        with patched(model) as cache:
            for _ in range(2):
                got = model(**call, **{GENERATE_CACHE: DynamicCache()})
                torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-12)
                assert output_cache(got).get_seq_length() == length + 3
    assert (cache.stats.misses, cache.stats.hits) == (2, 2)


def test_returned_cache_does_not_share_memory_with_the_entries() -> None:
    model = tiny_video_llava(eos=False)
    inputs = video_inputs(model)
    with patched(model) as cache:
        for how in (DynamicCache, lambda: StaticCache(config=model.config.text_config, max_cache_len=64)):
            past = how()
            expected = answer(model, inputs, **{GENERATE_CACHE: past})
            for layer in past.layers:
                layer.keys.zero_()
                layer.values.zero_()
            assert torch.equal(answer(model, inputs), expected)
    assert cache.stats.hits == 3
