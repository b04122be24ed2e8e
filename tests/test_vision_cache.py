"""A clip already seen costs no tower call and no prefill of its prefix, and changes no answer."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from tiny_models import (
    image_inputs,
    left_pad,
    random_clip,
    random_prompts,
    random_text,
    tiny_llama,
    tiny_video_llava,
    tokens_per_frame,
    video_inputs,
)
from torch import Tensor
from transformers import DynamicCache, StaticCache
from vision_probe import count_work

import specfuse
from specfuse.vision_cache import VisionCache, patch, patched, unpatch

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
    for mine, reference in zip(cached.past_key_values.layers, plain.past_key_values.layers, strict=True):
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
        assert torch.equal(answer(model, inputs, past_key_values=past), expected)
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
        expected = model(**call, past_key_values=DynamicCache())
        with patched(model) as cache:
            for _ in range(2):
                got = model(**call, past_key_values=DynamicCache())
                torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-12)
                assert got.past_key_values.get_seq_length() == length + 3
    assert (cache.stats.misses, cache.stats.hits) == (2, 2)


def test_returned_cache_does_not_share_memory_with_the_entries() -> None:
    model = tiny_video_llava(eos=False)
    inputs = video_inputs(model)
    with patched(model) as cache:
        for how in (DynamicCache, lambda: StaticCache(config=model.config.text_config, max_cache_len=64)):
            past = how()
            expected = answer(model, inputs, past_key_values=past)
            for layer in past.layers:
                layer.keys.zero_()
                layer.values.zero_()
            assert torch.equal(answer(model, inputs), expected)
    assert cache.stats.hits == 3


# ---------------------------------------------------------------- calls that are passed on


def bypass_cases(model: Any) -> dict[str, dict[str, Any]]:
    """Forward calls on one prompt that must reach the original forward unchanged."""
    inputs = video_inputs(model)
    length = inputs["input_ids"].shape[1]
    base = {**inputs, "use_cache": True, "logits_to_keep": 1}
    prefix = length - 6
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    bidirectional = causal.clone()
    bidirectional[..., 4:prefix, 4:prefix] = True
    biased = torch.zeros(1, 1, length, length).masked_fill(~causal, torch.finfo(torch.float32).min)
    soft = biased.clone()
    biased[..., prefix - 1, 5] = -0.5
    soft[..., 5, 6] = -0.5
    hole = inputs["attention_mask"].clone()
    hole[0, 6] = 0
    positions = torch.arange(length)[None]
    jump = positions + (positions > 7) * 3
    return {
        "labels": {**base, "labels": inputs["input_ids"][:, -6:], "logits_to_keep": 6},
        "all logits": {**base, "logits_to_keep": 0},
        "logits of the prefix": {**base, "logits_to_keep": torch.tensor([prefix - 1, length - 1])},
        "many last logits": {**base, "logits_to_keep": 7},
        "hidden states": {**base, "output_hidden_states": True},
        "attentions": {**base, "output_attentions": True},
        "tuple": {**base, "return_dict": False},
        "no cache": {**base, "use_cache": False},
        "bidirectional prefix": {**base, "attention_mask": bidirectional},
        "biased prefix": {**base, "attention_mask": biased},
        "future of the prefix faintly seen": {**base, "attention_mask": soft},
        "hole in the prefix": {**base, "attention_mask": hole},
        "jump in the positions": {**base, "position_ids": jump},
        "two-dimensional index": {**base, "logits_to_keep": torch.tensor([[length - 1]])},
    }


@pytest.mark.parametrize("name", sorted(bypass_cases(tiny_video_llava())))
def test_bypass(name: str) -> None:
    model = tiny_video_llava(attn_implementation="eager" if name == "attentions" else "sdpa")
    call = bypass_cases(model)[name]
    if name == "two-dimensional index":
        pytest.importorskip("transformers", minversion="5.23")
    with torch.no_grad():
        expected = model(**call)
        with patched(model) as cache:
            model(
                **video_inputs(model), use_cache=True, logits_to_keep=1
            )  # the clip is known: reuse would be seen
            got = model(**call)
    # A tuple of the forward without labels starts with the logits.
    for mine, reference in ((got[0], expected[0]), (got[1], expected[1])):
        if isinstance(mine, Tensor):
            assert torch.equal(mine, reference)
    assert (cache.stats.hits, cache.stats.misses, cache.stats.bypassed) == (0, 1, 1), cache.stats


def test_gradients_and_training_mode_bypass() -> None:
    model = tiny_video_llava()
    call = {**video_inputs(model), "use_cache": True, "logits_to_keep": 1}
    with patched(model) as cache:
        model(**call).logits.sum().backward()
        assert model.model.multi_modal_projector.linear_1.weight.grad is not None
        with torch.no_grad():
            model.train()(**call)
        assert cache.stats.bypass_reasons == {"gradients or training mode": 2}
        assert len(cache) == 0


def test_filled_cache_and_wrong_counts_reach_the_original() -> None:
    model = tiny_video_llava()
    call = {**video_inputs(model), "use_cache": True, "logits_to_keep": 1}
    with torch.no_grad(), patched(model) as cache:
        past = model(**call).past_key_values
        longer = {**call, "attention_mask": torch.ones(1, 2 * past.get_seq_length(), dtype=torch.int64)}
        model(**longer, past_key_values=past)
        fewer = {**call, "pixel_values_videos": call["pixel_values_videos"][:, :3]}
        with pytest.raises(ValueError, match="tokens"):  # transformers' own message
            model(**fewer)
    assert cache.stats.bypass_reasons == {"cache already filled": 1}
    assert len(cache) == 1


def test_length_dependent_rope_and_windows_bypass() -> None:
    model = tiny_video_llava()
    with patched(model) as cache:
        model.config.text_config.rope_parameters["rope_type"] = "dynamic"
        answer(model, video_inputs(model), max_new_tokens=1)
        model.config.text_config.rope_parameters["rope_type"] = "default"
        model.config.text_config.sliding_window = 8
        answer(model, video_inputs(model), max_new_tokens=1)
    assert cache.stats.bypass_reasons == {"rope type dynamic": 1, "sliding window 8": 1}


# ---------------------------------------------------------------- size


def entry_bytes(model: Any) -> int:
    with patched(model) as cache:
        answer(model, video_inputs(model), max_new_tokens=1)
    return cache.nbytes


def test_bytes_are_those_of_the_prefix() -> None:
    model = tiny_video_llava()
    tokens = 4 + 4 * tokens_per_frame(model)
    with patched(model) as cache:
        answer(model, video_inputs(model), max_new_tokens=1)
    assert cache.nbytes == 2 * 2 * 2 * 16 * 4 * tokens  # layers, k and v, heads, dim, bytes
    (entry,) = cache._entries.values()
    held = [t.untyped_storage().nbytes() for pair in entry.layers.values() for t in pair]
    assert sum(held) == cache.nbytes  # nothing larger is kept alive behind a view


def test_byte_bound_and_least_recently_used_order() -> None:
    model = tiny_video_llava(eos=False)
    size = entry_bytes(model)
    cache = VisionCache(max_bytes=2 * size + size // 2)

    def ask(clip: int) -> str:
        before = cache.stats.hits
        answer(model, video_inputs(model, clips=[clip]), max_new_tokens=1)
        assert cache.nbytes <= cache.max_bytes and cache.nbytes == len(cache) * size
        return "hit" if cache.stats.hits > before else "miss"

    with patched(model, cache):
        outcomes = [ask(clip) for clip in (0, 1, 0, 2, 0, 1)]  # 2 evicts 1, not 0
    assert outcomes == ["miss", "miss", "hit", "miss", "hit", "miss"]
    assert cache.stats.evictions == 2
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_an_entry_above_the_bound_is_not_stored() -> None:
    model = tiny_video_llava(eos=False)
    inputs = video_inputs(model, 3, clips=[0, 1, 0])
    expected = answer(model, inputs)
    for max_bytes in (0, entry_bytes(model) - 1, entry_bytes(model)):  # the last: one row evicts another
        cache = VisionCache(max_bytes=max_bytes)
        with patched(model, cache):
            for _ in range(2):
                assert torch.equal(answer(model, inputs), expected)
        assert cache.nbytes <= max_bytes


@pytest.mark.parametrize("bad", [-1, 1.5, "4GiB", True, None])
def test_max_bytes_is_checked(bad: Any) -> None:
    with pytest.raises(ValueError, match=f"max_bytes.*{bad}"):
        VisionCache(max_bytes=bad)


@pytest.mark.parametrize("entries", [1, 8])
def test_threads_share_a_cache(entries: int) -> None:
    """Four threads, three clips, several questions; with room for one entry, entries in use are evicted."""
    model = tiny_video_llava(eos=False)
    requests = [video_inputs(model, clips=[i % 3], question_seed=i) for i in range(12)]
    expected = [answer(model, request, max_new_tokens=4) for request in requests]
    wrong: list[int] = []
    cache = VisionCache(max_bytes=entries * entry_bytes(model))

    def work(offset: int) -> None:
        for i in range(offset, offset + 12):
            got = answer(model, requests[i % 12], max_new_tokens=4)
            if not torch.equal(got, expected[i % 12]):
                wrong.append(i % 12)

    with patched(model, cache):
        threads = [threading.Thread(target=work, args=(3 * t,)) for t in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert cache.stats.hits + cache.stats.misses == 48
    assert cache.nbytes <= cache.max_bytes


# ---------------------------------------------------------------- patch and unpatch


def test_unpatch_restores_the_original_object() -> None:
    model = tiny_video_llava()
    before, attributes = model.forward, dict(vars(model))
    cache = patch(model)
    assert model.forward != before and isinstance(cache, VisionCache)
    unpatch(model)
    assert "forward" not in vars(model)
    assert model.forward == before and model.forward.__func__ is type(model).forward
    assert vars(model) == attributes
    unpatch(model)  # nothing to do


def test_patching_twice_replaces_the_cache() -> None:
    model = tiny_video_llava()
    first = patch(model)
    second = patch(model, VisionCache())
    answer(model, video_inputs(model), max_new_tokens=1)
    assert (len(first), len(second)) == (0, 1)
    unpatch(model)
    assert "forward" not in vars(model)


def test_patching_again_finds_the_entries_of_before() -> None:
    model = tiny_video_llava()
    cache = VisionCache()
    for _ in range(2):
        with patched(model, cache):
            answer(model, video_inputs(model), max_new_tokens=1)
    assert (cache.stats.misses, cache.stats.hits) == (1, 1)


def test_a_forward_set_on_the_instance_comes_back() -> None:
    model = tiny_video_llava()
    calls = []

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(sorted(kwargs))
        return type(model).forward(model, *args, **kwargs)

    hooked.__signature__ = __import__("inspect").signature(model.forward)  # type: ignore[attr-defined]
    model.forward = hooked
    patch(model)
    answer(model, video_inputs(model), max_new_tokens=1)
    assert calls
    unpatch(model)
    assert vars(model)["forward"] is hooked


def test_unpatch_refuses_to_drop_a_wrapper() -> None:
    import functools

    model = tiny_video_llava()
    patch(model)
    inner = model.forward

    @functools.wraps(inner, assigned=())
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    model.forward = wrapper
    with pytest.raises(ValueError, match="wrap"):
        unpatch(model)


def test_deepcopy_of_a_patched_model_is_its_own() -> None:
    model = tiny_video_llava(eos=False)
    inputs = video_inputs(model)
    with patched(model) as cache:
        answer(model, inputs)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.lm_head.weight.neg_()
        assert twin.forward.original.__self__ is twin and twin.forward.cache is cache
        reference = copy.deepcopy(twin)
        unpatch(reference)
        assert torch.equal(answer(twin, inputs), answer(reference, inputs))
        assert (cache.stats.hits, cache.stats.misses) == (0, 2)
        with pytest.raises(TypeError, match="unpatch"):
            pickle.dumps(model.forward)


def test_unsupported_models_and_caches_are_named() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        patch(tiny_llama())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cache must be a VisionCache, got dict"):
        patch(tiny_video_llava(), cache={})  # type: ignore[arg-type]
