"""Forward calls that must not be served from the vision cache reach the original forward unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_video_llava, video_inputs
from torch import Tensor

from specfuse.hf.cache_names import GENERATE_CACHE, output_cache
from specfuse.vision.cache import patched


def answer(model: Any, inputs: dict[str, Tensor], tokens: int = 10) -> Tensor:
    """Greedy answer of `model.generate`, [B, S + tokens]."""
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False)


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
        past = output_cache(model(**call))
        longer = {**call, "attention_mask": torch.ones(1, 2 * past.get_seq_length(), dtype=torch.int64)}
        model(**longer, **{GENERATE_CACHE: past})
        fewer = {**call, "pixel_values_videos": call["pixel_values_videos"][:, :3]}
        with pytest.raises(ValueError, match="tokens"):  # transformers' own message
            model(**fewer)
    assert cache.stats.bypass_reasons == {"cache already filled": 1}
    assert len(cache) == 1


def test_length_dependent_rope_and_windows_bypass() -> None:
    model = tiny_video_llava()
    with patched(model) as cache:
        model.config.text_config.rope_parameters["rope_type"] = "dynamic"
        answer(model, video_inputs(model), tokens=1)
        model.config.text_config.rope_parameters["rope_type"] = "default"
        model.config.text_config.sliding_window = 8
        answer(model, video_inputs(model), tokens=1)
    assert cache.stats.bypass_reasons == {"rope type dynamic": 1, "sliding window 8": 1}
