"""Every argument of model.generate means here what it means there, or is refused by name."""

from __future__ import annotations

import pytest
import torch
from scripted_drafters import OracleDrafter
from tiny_models import EOS, random_prompts, tiny_llama, tiny_video_llava, video_inputs
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import specfuse
from specfuse.hf.cache_names import GENERATE_CACHE, output_cache

NEW_TOKENS = 16


def character(token: int) -> str:
    """The character that stands for a token id: the letters first, then others."""
    return chr(ord("a") + token) if token < 26 else chr(0x100 + token)


def character_tokenizer(vocab: int = 128) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={character(i): i for i in range(vocab)}, merges=[]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def run(model, inputs, expected=None, max_nodes=16, **kwargs):
    """Speculates with an oracle that knows ``expected``, so that trees are really accepted."""
    length = inputs["input_ids"].shape[1]
    batch = inputs["input_ids"].shape[0]
    answers = [[3]] * batch if expected is None else expected[:, length:].tolist()
    # With num_return_sequences there are more rows than prompts.
    drafter = OracleDrafter(answers, vocab=128, seed=1)
    return specfuse.generate(model, drafter, max_nodes=max_nodes, **inputs, **kwargs)


def assert_same(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs
    expected = model.generate(**inputs, **kwargs)
    assert torch.equal(run(model, inputs, expected, **kwargs), expected)
    assert torch.equal(specfuse.generate(model, None, **inputs, **kwargs), expected)
    return expected


def first_answer(model, inputs, row=0) -> list[int]:
    sequences = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return sequences[row, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(params=[1, 4], ids=["B1", "B4"])
def batch(request) -> int:
    return request.param


@pytest.mark.parametrize(
    "kwargs",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_new_tokens": None, "max_length": 30},
        {"min_new_tokens": 12},
        {"min_length": 25},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [9, 11], [60]]},
        {"sequence_bias": [[[17], 9.0], [[20, 21], -5.0]]},
        {"suppress_tokens": list(range(40, 90))},
        {"begin_suppress_tokens": list(range(3, 60))},
        {"forced_eos_token_id": 2},
        {"exponential_decay_length_penalty": (4, 1.4)},
        {"remove_invalid_values": True, "renormalize_logits": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
def test_logits_processors_and_lengths(kwargs, batch):
    for seed in range(2):
        model = tiny_llama(seed=seed)
        assert_same(model, random_prompts(model, batch, seed=seed), **kwargs)


def test_processors_on_video(batch):
    model = tiny_video_llava(seed=0)
    assert_same(model, video_inputs(model, batch), repetition_penalty=1.5, no_repeat_ngram_size=2)


def test_several_end_of_sequence_ids(batch):
    model = tiny_llama(seed=0)
    inputs = random_prompts(model, batch)
    ends = {first_answer(model, inputs, row)[4 + row] for row in range(batch)}
    expected = assert_same(model, inputs, eos_token_id=[EOS, *ends], pad_token_id=0)
    assert expected.shape[1] < inputs["input_ids"].shape[1] + NEW_TOKENS


def test_stop_strings_in_the_middle_of_an_accepted_path(batch):
    model = tiny_llama(seed=1, eos=False)
    inputs = random_prompts(model, batch)
    word = "".join(map(character, first_answer(model, inputs)[5:7]))
    expected = assert_same(model, inputs, stop_strings=[word], tokenizer=character_tokenizer())
    if batch == 1:
        assert expected.shape[1] < inputs["input_ids"].shape[1] + NEW_TOKENS


def test_stop_strings_of_the_generation_config():
    model = tiny_llama(seed=1, eos=False)
    inputs = random_prompts(model, 1)
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, stop_strings=[character(first_answer(model, inputs)[6])], pad_token_id=0
    )
    expected = model.generate(**inputs, generation_config=config, tokenizer=character_tokenizer())
    got = run(model, inputs, expected, generation_config=config, tokenizer=character_tokenizer())
    assert torch.equal(got, expected)


class StopAt(StoppingCriteria):
    """Stops a row once it holds a token, looking at its last one only: every step must be shown to it."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.lengths: list[int] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return torch.tensor([int(row[-1]) in self.tokens for row in input_ids])


@pytest.mark.parametrize("eos", [True, False])
def test_custom_stopping_criteria(batch, eos):
    model = tiny_llama(seed=2, eos=eos)
    inputs = random_prompts(model, batch)
    tokens = {first_answer(model, inputs, row)[3 + 2 * row] for row in range(batch)}
    expected = assert_same(model, inputs, stopping_criteria=StoppingCriteriaList([StopAt(tokens)]))
    assert expected.shape[1] < inputs["input_ids"].shape[1] + NEW_TOKENS


def test_stopping_criteria_see_every_length_once():
    model = tiny_llama(seed=2, eos=False)
    inputs = random_prompts(model, 1)
    expected = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    criterion = StopAt(set())
    run(model, inputs, expected, max_new_tokens=NEW_TOKENS, stopping_criteria=[criterion])
    first = inputs["input_ids"].shape[1] + 1
    assert criterion.lengths == list(range(first, first + NEW_TOKENS))


class Alternate(LogitsProcessor):
    """Depends on the length and on the row's last token; forbids what it has just seen."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, input_ids.shape[1] % 2 :: 2] -= 3.0
        return scores.scatter(1, input_ids[:, -1:], -float("inf"))


def test_custom_logits_processor(batch):
    model = tiny_llama(seed=3)
    assert_same(model, random_prompts(model, batch), logits_processor=LogitsProcessorList([Alternate()]))


def test_prefix_allowed_tokens_fn_is_asked_with_the_right_row(batch):
    model = tiny_llama(seed=3)
    inputs = random_prompts(model, batch)

    def allowed(row, ids):
        assert ids[: inputs["input_ids"].shape[1]].tolist() == inputs["input_ids"][row].tolist()
        return [EOS, *range(20 + 10 * row, 60 + 10 * row)]

    assert_same(model, inputs, prefix_allowed_tokens_fn=allowed)


def test_no_allowed_token_is_an_error():
    model = tiny_llama(seed=3)
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn returned no token for row 0"):
        specfuse.generate(
            model, None, **random_prompts(model, 1), prefix_allowed_tokens_fn=lambda row, ids: []
        )


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value):
        self.puts.append(value)

    def end(self):
        self.ended += 1


def test_streamer_gets_what_generate_streams(batch):
    model = tiny_llama(seed=0)
    inputs = random_prompts(model, batch)
    theirs, ours = Recorder(), Recorder()
    expected = model.generate(**inputs, max_new_tokens=NEW_TOKENS, streamer=theirs)
    run(model, inputs, expected, max_new_tokens=NEW_TOKENS, streamer=ours)
    assert ours.ended == theirs.ended == 1
    assert [put.tolist() for put in ours.puts] == [put.tolist() for put in theirs.puts]


@pytest.mark.parametrize("processors", [{}, {"repetition_penalty": 1.4}], ids=["none", "penalty"])
def test_scores_and_logits(batch, processors):
    model = tiny_llama(seed=0, dtype=torch.float64)
    inputs = random_prompts(model, batch)
    kwargs = {
        "max_new_tokens": NEW_TOKENS,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        **processors,
    }
    expected = model.generate(**inputs, **kwargs)
    got = run(model, inputs, expected.sequences, **kwargs)
    assert type(got) is type(expected)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.scores) == len(expected.scores)
    length = inputs["input_ids"].shape[1]
    for step, (ours, theirs) in enumerate(zip(got.scores, expected.scores, strict=True)):
        for row in range(batch):
            if EOS not in got.sequences[row, length : length + step].tolist():
                torch.testing.assert_close(ours[row], theirs[row], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(
                    got.logits[step][row], expected.logits[step][row], atol=1e-4, rtol=1e-4
                )
            else:
                assert ours[row].argmax() == got.sequences[row, length + step]
    if batch == 1:
        ours = model.compute_transition_scores(got.sequences, got.scores, normalize_logits=True)
        theirs = model.compute_transition_scores(expected.sequences, expected.scores, normalize_logits=True)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_logits_without_scores_keep_the_fused_path():
    model = tiny_llama(seed=0, dtype=torch.float64)
    inputs = random_prompts(model, 2)
    kwargs = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**inputs, **kwargs)
    got = run(model, inputs, expected.sequences, **kwargs)
    assert got.scores is None
    torch.testing.assert_close(got.logits[0], expected.logits[0], atol=1e-4, rtol=1e-4)


def test_stats_of_the_returned_dict():
    model = tiny_llama(seed=0, eos=False)
    inputs = random_prompts(model, 2)
    expected = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    out = run(model, inputs, expected, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
    stats = out.stats
    assert stats.tokens == 2 * NEW_TOKENS == sum(k * v for k, v in stats.histogram.items())
    assert stats.passes == sum(stats.histogram.values())
    assert stats.prefill_ms > 0 and stats.verify_ms > 0
    assert set(out.keys()) == {"sequences", GENERATE_CACHE}
    assert stats.as_dict()["tokens_per_pass"] == stats.tokens_per_pass


def test_custom_generate_is_a_drop_in(batch):
    model = tiny_video_llava(seed=0)
    inputs = video_inputs(model, batch)
    expected = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    drafter = OracleDrafter(expected[:, inputs["input_ids"].shape[1] :].tolist(), vocab=100)
    recorder = Recorder()
    drop_in = specfuse.custom_generate(drafter, max_nodes=8, streamer=recorder)
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW_TOKENS, custom_generate=drop_in), expected)
    assert recorder.ended == 1


def test_generation_config_object_is_left_alone():
    model = tiny_llama(seed=0)
    inputs = random_prompts(model, 1)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    before = config.to_dict()
    assert specfuse.generate(model, None, **inputs, generation_config=config).shape[1] == 5 + 8
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"guidance_scale": 1.5},
        {"prompt_lookup_num_tokens": 3},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"cache_implementation": "offloaded"},
        {"assistant_model": object()},
        {"negative_prompt_ids": torch.ones(1, 2)},
        {"custom_generate": "some/repo"},
        {"no_such_argument": 3},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
@pytest.mark.filterwarnings("ignore")
def test_unsupported_arguments_are_refused_by_name(kwargs):
    model = tiny_llama(seed=0)
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        specfuse.generate(model, None, **random_prompts(model, 1), max_new_tokens=4, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drafter": "magic"}, "drafter must be .* got 'magic'"),
        ({"max_nodes": 0}, "max_nodes must be 'auto' or an int from 1 to 1023, got 0"),
        ({"max_nodes": 2.5}, "max_nodes must be 'auto' or an int from 1 to 1023, got 2.5"),
        ({"seed": [1, 2, 3]}, "seed must be an int or 1 ints"),
        ({"seed": "a"}, "seed must be an int or 1 ints .* got 'a'"),
    ],
)
def test_bad_arguments(arguments, message):
    model = tiny_llama(seed=0)
    with pytest.raises(ValueError, match=message):
        specfuse.generate(
            model, **({"drafter": None} | arguments), **random_prompts(model, 1), max_new_tokens=4
        )


def test_stop_strings_need_a_tokenizer():
    model = tiny_llama(seed=0)
    with pytest.raises(ValueError, match=r"stop_strings=.* tokenizer"):
        specfuse.generate(model, None, **random_prompts(model, 1), stop_strings=["x"])


def test_position_ids_of_the_caller(batch):
    model = tiny_llama(seed=0)
    inputs = random_prompts(model, batch, pad=False)
    length = inputs["input_ids"].shape[1]
    for position_ids in (torch.arange(3, 3 + length)[None], 2 * torch.arange(length)[None]):
        assert_same(model, inputs, position_ids=position_ids.expand(batch, -1))


def test_returned_cache_of_rows_that_finish_early():
    model = tiny_llama(seed=0, dtype=torch.float64, eos=False)
    inputs = random_prompts(model, 2, pad=False)
    ends = first_answer(model, inputs)[4]
    kwargs = {"max_new_tokens": 12, "eos_token_id": ends, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **kwargs)
    got = run(model, inputs, expected.sequences, **kwargs)
    assert torch.equal(got.sequences, expected.sequences)
    assert got.sequences[0, -1] == 0 and got.sequences[1, -1] != 0
    for ours, theirs in zip(output_cache(got).layers, output_cache(expected).layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)


def test_a_model_split_over_devices_is_refused():
    model = tiny_llama(seed=0)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(ValueError, match=r"split over devices \['0', '1'\]"):
        specfuse.generate(model, None, **random_prompts(model, 1), max_new_tokens=4)


def test_attention_without_tree_masks_is_refused():
    model = tiny_llama(seed=0)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='flex_attention'"):
        specfuse.generate(model, None, **random_prompts(model, 1), max_new_tokens=4)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_nan_logits_raise(batch, do_sample):
    model = tiny_llama(seed=0)
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(FloatingPointError, match="row 0: the model's logits hold NaN"):
        specfuse.generate(model, None, **random_prompts(model, batch), max_new_tokens=4, do_sample=do_sample)
