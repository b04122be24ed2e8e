"""The conventions of transformers that specfuse relies on: names of the cache, and passes that broke them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_layout import tracked_files
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import specfuse
from specfuse.hf.cache_names import (
    CACHE_NAMES,
    GENERATE_CACHE,
    OUTPUT_CACHE,
    cache_argument,
    cache_field,
    output_cache,
    pop_cache,
    with_cache_name,
)
from specfuse.hf.versions import outside_range, supported_range


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


def prompt(seed: int = 0) -> dict[str, Any]:
    ids = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


OPTIONS = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}


def test_names_of_the_cache_stand_in_one_place_only() -> None:
    marks = ('"past_key_values"', ".past_key_values", "past_key_values=")
    offenders = [
        path.name
        for path in tracked_files()
        if path.suffix == ".py"
        and "specfuse" in path.parts
        and path.parent.name != "hf"
        # EventGPT declares both names, as transformers' classes do; error texts quote the user's argument.
        and path.name not in ("eventgpt.py", "kv_cache.py", "test_hf_conventions.py")
        and not {"tests", "benchmarks"} & set(path.parts)
        and any(mark in path.read_text() for mark in marks)
    ]
    assert offenders == []


def test_generate_raises_no_deprecation_warning(model: LlamaForCausalLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        expected = model.generate(**prompt(), **OPTIONS)
        for _ in range(2):
            assert torch.equal(specfuse.generate(model, **prompt(), **OPTIONS), expected)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_given_cache_is_taken_under_either_name(model: LlamaForCausalLM, name: str) -> None:
    inputs = prompt()
    with torch.no_grad():
        past = output_cache(model(inputs["input_ids"][:, :9], use_cache=True))
    expected = model.generate(**inputs, **OPTIONS)
    assert torch.equal(specfuse.generate(model, **inputs, **{name: past}, **OPTIONS), expected)


def test_argument_and_field_are_found_by_looking(model: LlamaForCausalLM) -> None:
    def old(input_ids: Any, past_key_values: Any = None) -> None: ...

    def new(input_ids: Any, cache: Any = None, **kwargs: Any) -> None: ...

    def none(input_ids: Any) -> None: ...

    assert cache_argument(old) == "past_key_values"
    assert cache_argument(new) == "cache"
    assert cache_argument(lambda **kwargs: None) == OUTPUT_CACHE
    assert cache_argument(model.forward) == OUTPUT_CACHE == GENERATE_CACHE
    with pytest.raises(ValueError, match="keeps no KV cache"):
        cache_argument(none)
    with pytest.raises(RuntimeError, match="Verdict"):
        cache_field(specfuse.Verdict)


def test_two_caches_under_two_names_are_refused() -> None:
    one, other = DynamicCache(), DynamicCache()
    assert pop_cache({"cache": one, "past_key_values": one}) is one
    assert with_cache_name({"past_key_values": one, "x": 1}, "cache") == {"cache": one, "x": 1}
    with pytest.raises(ValueError, match="pass one of them"):
        pop_cache({"cache": one, "past_key_values": other})


# ---------------------------------------------------------------- changes that transformers might make


def rewired(model: LlamaForCausalLM, change: Any) -> LlamaForCausalLM:
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **change(dict(kwargs)))

    forward.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    model.forward = forward  # type: ignore[method-assign]
    return model


def without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    pop_cache(kwargs)
    return kwargs


def with_cache_of_its_own(kwargs: dict[str, Any]) -> dict[str, Any]:
    pop_cache(kwargs)
    return {**kwargs, OUTPUT_CACHE: DynamicCache()}


@pytest.mark.parametrize("change", [without_cache, with_cache_of_its_own])
def test_a_model_that_ignores_our_cache_is_an_error_before_a_token(
    model: LlamaForCausalLM, change: Any
) -> None:
    shown: list[int] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            shown.append(value.numel())

        def end(self) -> None: ...

    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM .*wrote 0 entries to the KV cache"):
        specfuse.generate(rewired(model, change), **prompt(), **OPTIONS, streamer=Streamer(), check=False)
    assert shown == [12]  # the prompt, as model.generate shows it


def mask_dropped(kwargs: dict[str, Any]) -> dict[str, Any]:
    mask = kwargs.get("attention_mask")
    return {**kwargs, "attention_mask": None} if mask is not None and mask.dim() == 4 else kwargs


def positions_dropped(kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs.pop("position_ids", None)
    return kwargs


@pytest.mark.parametrize(
    "change", [None, mask_dropped, positions_dropped, without_cache, with_cache_of_its_own]
)
def test_check_finds_broken_conventions(model: LlamaForCausalLM, change: Any) -> None:
    verdict = specfuse.check(model if change is None else rewired(model, change))
    assert verdict.trees is (change is None), verdict
    assert verdict.error < 1e-3 if change is None else verdict.reason


class Renamed(LlamaForCausalLM):
    """A class that nobody has tested, whose forward drops the tree's mask."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **mask_dropped(kwargs))


def test_a_class_that_fails_its_check_is_decoded_plainly(model: LlamaForCausalLM) -> None:
    model.__class__ = Renamed
    expected = model.generate(**prompt(), **OPTIONS)
    with pytest.warns(UserWarning, match="decoding plainly with model.generate: model Renamed"):
        got = specfuse.generate(model, **prompt(), **OPTIONS)
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match=r"model Renamed .*does not support trees"):
        specfuse.generate(model, specfuse.PromptLookupDrafter(), **prompt(), **OPTIONS)


def test_right_padding_is_refused(model: LlamaForCausalLM) -> None:
    inputs = prompt()
    inputs["attention_mask"][:, -2:] = 0
    with pytest.raises(ValueError, match=r"attention_mask ends in 0 in rows \[0\]"):
        specfuse.generate(model, **inputs, **OPTIONS)


def test_no_pass_crosses_a_boundary_of_rope_frequencies() -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters=rope,
    )
    model = LlamaForCausalLM(config).eval()
    within = {**OPTIONS, "max_new_tokens": 8}
    expected = model.generate(**prompt(), **within)
    assert torch.equal(specfuse.generate(model, None, **prompt(), **within), expected)
    with pytest.raises(ValueError, match="rope type 'dynamic' changes its frequencies beyond 64 tokens"):
        specfuse.generate(
            model, specfuse.PromptLookupDrafter(), **prompt(), **OPTIONS | {"max_new_tokens": 60}
        )


def test_the_installed_transformers_is_within_the_supported_range() -> None:
    low, high = supported_range("transformers")
    assert (low, high) == ("5.17", "5.25")
    assert outside_range("transformers", "5.16.9") and outside_range("transformers", "5.25.0")
    assert not outside_range("transformers", "5.17.0") and not outside_range("transformers", "5.24.3")
    message = outside_range("transformers", "5.25.0")
    assert message is not None and "transformers 5.25.0" in message and ">=5.17,<5.25" in message
