"""`patch` and `unpatch` leave a model as they found it."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, tiny_video_llava, video_inputs
from torch import Tensor

from specfuse.vision.cache import VisionCache, patch, patched, unpatch


def answer(model: Any, inputs: dict[str, Tensor], tokens: int = 10) -> Tensor:
    """Greedy answer of `model.generate`, [B, S + tokens]."""
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False)


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
    answer(model, video_inputs(model), tokens=1)
    assert (len(first), len(second)) == (0, 1)
    unpatch(model)
    assert "forward" not in vars(model)


def test_patching_again_finds_the_entries_of_before() -> None:
    model = tiny_video_llava()
    cache = VisionCache()
    for _ in range(2):
        with patched(model, cache):
            answer(model, video_inputs(model), tokens=1)
    assert (cache.stats.misses, cache.stats.hits) == (1, 1)


def test_a_forward_set_on_the_instance_comes_back() -> None:
    model = tiny_video_llava()
    calls = []

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(sorted(kwargs))
        return type(model).forward(model, *args, **kwargs)

    hooked.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    model.forward = hooked
    patch(model)
    answer(model, video_inputs(model), tokens=1)
    assert calls
    unpatch(model)
    assert vars(model)["forward"] is hooked


def test_unpatch_refuses_to_drop_a_wrapper() -> None:
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
