"""Inputs of a call that need a decision: taken, since they change no token, decoded plainly, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import random_prompts, tiny_llama
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StoppingCriteria, StoppingCriteriaList

import specfuse
from specfuse.hf.cache_names import GENERATE_CACHE, output_cache


@pytest.mark.parametrize(
    "kwargs",
    [{"use_cache": False}, {"prefill_chunk_size": 4}, {"cache_implementation": "sliding_window"}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_arguments_that_change_no_token_are_taken(kwargs):
    model = tiny_llama(seed=0)
    inputs = random_prompts(model, 1)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    got = specfuse.generate(model, **inputs, max_new_tokens=8, do_sample=False, **kwargs)
    assert torch.equal(got, expected)


def test_a_criterion_that_reads_scores_is_refused_by_name():
    class ReadsScores(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([bool(scores[-1].max() > 1e9)])

    model = tiny_llama(seed=0)
    criteria = StoppingCriteriaList([ReadsScores()])
    with pytest.raises(ValueError, match=r"stopping_criteria: .* scores"):
        specfuse.generate(model, **random_prompts(model, 1), max_new_tokens=4, stopping_criteria=criteria)


@pytest.mark.parametrize("extra", [0, 3])
def test_a_cache_that_holds_the_whole_prompt_is_refused_by_name(extra):
    model = tiny_llama(seed=0)
    inputs = random_prompts(model, 1)
    longer = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :extra]], dim=1)
    with torch.no_grad():
        past = output_cache(model(longer, use_cache=True))
    # transformers 5.24 itself cuts such a cache back; where it does not, we say what is wrong.
    try:
        got = specfuse.generate(model, **inputs, **{GENERATE_CACHE: past}, max_new_tokens=4, do_sample=False)
    except ValueError as error:
        assert "past_key_values holds" in str(error)
    else:
        assert torch.equal(got, model.generate(**inputs, max_new_tokens=4, do_sample=False))


@pytest.fixture
def gpt2() -> Any:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=128)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


def test_inputs_with_an_entry_per_token_are_decoded_plainly(gpt2):
    ids = torch.randint(3, 99, (1, 9), generator=torch.Generator().manual_seed(0))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.ones_like(ids),
    }
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = gpt2.generate(**inputs, **options)
    with pytest.warns(
        UserWarning, match=r"decoding plainly .*token_type_ids \(1, 9\) holds an entry per prompt"
    ):
        assert torch.equal(specfuse.generate(gpt2, **inputs, **options), expected)
    with pytest.raises(ValueError, match="token_type_ids"):
        specfuse.generate(gpt2, specfuse.PromptLookupDrafter(), **inputs, **options)


def test_peft_prompt_tuning_is_decoded_plainly_and_lora_by_trees():
    peft = pytest.importorskip("peft")
    options = {"max_new_tokens": 12, "do_sample": False}
    model = tiny_llama(seed=0)
    inputs = random_prompts(model, 1)
    lora = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    assert torch.equal(specfuse.generate(lora, **inputs, **options), lora.generate(**inputs, **options))
    model = tiny_llama(seed=0)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(model, prompts).eval()
    expected = tuned.generate(**inputs, **options)
    with pytest.warns(UserWarning, match="decoding plainly"):
        assert torch.equal(specfuse.generate(tuned, **inputs, **options), expected)


@pytest.mark.parametrize("eos", [None, 5])
@pytest.mark.parametrize("filled", [0, 4])
def test_the_callers_cache_is_filled(filled: int, eos: int | None):
    model = tiny_llama(seed=0)
    inputs = random_prompts(model, 1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": eos}
    theirs, ours = DynamicCache(), DynamicCache()
    if filled:
        with torch.no_grad():
            for cache in (theirs, ours):
                model(inputs["input_ids"][:, :filled], **{GENERATE_CACHE: cache}, use_cache=True)
    expected = model.generate(**inputs, **{GENERATE_CACHE: theirs}, **options)
    got = specfuse.generate(model, **inputs, **{GENERATE_CACHE: ours}, **options)
    assert torch.equal(got, expected)
    assert ours.get_seq_length() == theirs.get_seq_length() > 0
    for mine, reference in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(mine.keys, reference.keys)
        torch.testing.assert_close(mine.values, reference.values)
    # The documented idiom: the same cache in the next turn.
    longer = {name: torch.cat([value, value[:, :3]], dim=1) for name, value in inputs.items()}
    longer["input_ids"] = torch.cat([got, got[:, :3]], dim=1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    expected = model.generate(**longer, **{GENERATE_CACHE: theirs}, **options)
    output = specfuse.generate(
        model, **longer, **{GENERATE_CACHE: ours}, **options, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, expected) and output_cache(output) is ours
