"""Calls that only ``model.generate`` decodes rightly: found before a pass, decoded plainly or refused."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import specfuse
from specfuse.support import PlainOnly, is_tested

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PLAIN = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def sharpened(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model.double().eval()


def neo(**options: Any) -> Any:
    torch.manual_seed(0)
    config = GPTNeoConfig(vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, **options)
    return sharpened(GPTNeoForCausalLM(config))


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return sharpened(LlamaForCausalLM(LlamaConfig(**SIZES, **options)))


def gpt2() -> Any:
    torch.manual_seed(0)
    return sharpened(
        GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128))
    )


def prompt(length: int = 20) -> dict[str, Any]:
    ids = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def assert_decoded_plainly(model: Any, match: str, inputs: dict[str, Any], new: int = 16) -> None:
    expected = model.generate(**inputs, max_new_tokens=new, **PLAIN)
    with pytest.warns(UserWarning, match=f"decoding plainly .*{match}"):
        got = specfuse.generate(model, max_nodes=8, **inputs, max_new_tokens=new, **PLAIN)
    assert torch.equal(got, expected)
    with pytest.raises(PlainOnly, match=match):
        specfuse.generate(
            model, specfuse.PromptLookupDrafter(), max_nodes=8, **inputs, max_new_tokens=new, **PLAIN
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_windows_inside_layers(dtype: torch.dtype) -> None:
    local = {"attention_types": [[["global", "local"], 1]], "window_size": 24, "max_position_embeddings": 128}
    assert_decoded_plainly(neo(**local).to(dtype), "a window of 24 tokens", prompt())


def test_layer_types_that_a_class_does_not_read() -> None:
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, sliding_window=8, layer_types=["full_attention"] * 2)
    assert_decoded_plainly(sharpened(MistralForCausalLM(config)), "does not support trees", prompt())


def test_a_window_that_a_class_ignores() -> None:
    assert_decoded_plainly(llama(sliding_window=16), "a window of 16 tokens", prompt())


def test_slots_of_masks_kept_as_buffers() -> None:
    types = {"attention_types": [[["global"], 2]], "max_position_embeddings": 42}
    assert_decoded_plainly(neo(**types), "causal masks hold 42 slots", prompt())


@pytest.mark.parametrize("form", ["inputs_embeds", "position_ids"])
def test_positions_near_a_boundary_of_rope_frequencies(form: str) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    model, inputs = llama(max_position_embeddings=64, rope_parameters=rope), prompt(44)
    if form == "inputs_embeds":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    else:
        inputs = {**prompt(12), "position_ids": torch.arange(50, 62)[None]}
    assert_decoded_plainly(model, "beyond 64 tokens", inputs, new=16 if form == "inputs_embeds" else 4)


def test_one_row_of_token_types_for_two() -> None:
    inputs = {name: value.repeat(2, 1) for name, value in prompt().items()}
    inputs["token_type_ids"] = torch.ones(1, 20, dtype=torch.int64)
    assert_decoded_plainly(gpt2(), "token_type_ids", inputs)


def test_a_wrapped_forward_does_not_take_its_twins_verdict() -> None:
    twin, model, tested = gpt2(), gpt2(), llama()
    assert not is_tested(twin) and is_tested(tested)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        specfuse.generate(twin, **prompt(), max_new_tokens=4, **PLAIN)
    for wrapped in (model, tested):
        original = wrapped.forward

        @functools.wraps(original)
        def forward(*args: Any, original: Any = original, position_ids: Any = None, **kwargs: Any) -> Any:
            return original(*args, **kwargs)

        wrapped.forward = forward
        assert not is_tested(wrapped)
        assert_decoded_plainly(wrapped, "does not support trees", prompt())


def test_gradient_checkpointing_in_training_mode() -> None:
    model = gpt2()
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(PlainOnly, match="training mode with gradient checkpointing"):
        specfuse.generate(model, specfuse.PromptLookupDrafter(), **prompt(), max_new_tokens=4, **PLAIN)


def test_a_verdict_in_training_mode_does_not_last() -> None:
    torch.manual_seed(1)
    model = gpt2().train()
    with pytest.warns(UserWarning, match=r"training mode; call model.eval"):
        specfuse.generate(model, **prompt(), max_new_tokens=4, **PLAIN)
    assert specfuse.check(model.eval()).trees


def test_a_stream_decodes_such_requests_plainly() -> None:
    model = llama(sliding_window=24)
    requests = [{"id": n, **prompt(n), "max_new_tokens": 6, **PLAIN} for n in (10, 30)]
    expected = {r["id"]: model.generate(**{k: v for k, v in r.items() if k != "id"}) for r in requests}
    with pytest.warns(UserWarning, match="a window of 24 tokens"):
        answers = list(specfuse.SpeculativeGenerator(model, max_nodes=4).stream(requests))
    assert sorted(answer.id for answer in answers) == [10, 30]
    for answer in answers:
        assert answer.error is None
        assert torch.equal(answer.sequences, expected[answer.id])
        assert answer.tokens == expected[answer.id][0, answer.id :].tolist()
