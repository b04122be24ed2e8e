"""Generation is an equality: speculative == model.generate, token for token."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from scripted_drafters import OracleChainDrafter, OracleDrafter, RandomTreeDrafter
from tiny_models import random_prompts, tiny_llama, tiny_qwen2, tiny_video_llava, video_inputs
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

import specfuse.run
from specfuse import CombinedDrafter, CorpusDrafter, ModelDrafter, PromptLookupDrafter
from specfuse.hf.cache_names import GENERATE_CACHE, output_cache

NEW_TOKENS = 20
MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "video_llava": tiny_video_llava}


def inputs_for(name: str, model, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    if name == "video_llava":
        return video_inputs(model, batch, seed=seed)
    return random_prompts(model, batch, seed=seed)


def plain(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs
    return model.generate(**inputs, **kwargs)


def answers_of(sequences: torch.Tensor, inputs) -> list[list[int]]:
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


def speculate(model, inputs, drafter, max_nodes=16, **kwargs):
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs
    generator = specfuse.SpeculativeGenerator(model, drafter, max_nodes=max_nodes)
    return generator.generate(**inputs, **kwargs), generator.last_stats


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", MODELS)
def test_trees_with_right_and_wrong_branches_change_nothing(name, dtype, batch):
    for seed in range(3):
        model = MODELS[name](seed=seed, dtype=dtype)
        inputs = inputs_for(name, model, batch, seed)
        expected = plain(model, inputs)
        accepted = 0
        for max_nodes in (2, 3, 8, 31, 64):
            drafter = OracleDrafter(answers_of(expected, inputs), vocab=128, seed=max_nodes)
            got, stats = speculate(model, inputs, drafter, max_nodes)
            assert torch.equal(got, expected), f"seed {seed}, max_nodes {max_nodes}"
            accepted += stats.tokens - stats.passes
        assert accepted > 0


@pytest.mark.parametrize("name", MODELS)
def test_useless_drafts_change_nothing(name):
    model = MODELS[name](seed=5)
    inputs = inputs_for(name, model, 3)
    got, _ = speculate(model, inputs, RandomTreeDrafter(vocab=128))
    assert torch.equal(got, plain(model, inputs))


@pytest.mark.parametrize(
    "drafter",
    [
        lambda model: None,
        lambda model: PromptLookupDrafter(),
        lambda model: CorpusDrafter(),
        lambda model: ModelDrafter(model, depth=3),
        lambda model: ModelDrafter(tiny_llama(seed=9), depth=3, branching=3),
        lambda model: CombinedDrafter([CorpusDrafter(), PromptLookupDrafter(), ModelDrafter(model)]),
        lambda model: "auto",
    ],
    ids=["none", "lookup", "corpus", "model-copy", "model-tree", "combined", "auto"],
)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_every_drafter_gives_the_tokens_of_generate(name, batch, drafter):
    model = MODELS[name](seed=1)
    instance = drafter(model)
    for seed in range(2):
        inputs = inputs_for(name, model, batch, seed)
        expected = plain(model, inputs)
        for _ in range(2):  # the second time a remembering drafter knows the answer
            got, _ = speculate(model, inputs, instance)
            assert torch.equal(got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_batch_equals_one_by_one(name):
    model = MODELS[name](seed=2, dtype=torch.float64)
    inputs = inputs_for(name, model, 3)
    batched = answers_of(speculate(model, inputs, PromptLookupDrafter())[0], inputs)
    for row in range(3):
        kept = inputs["attention_mask"][row].bool()
        single = {"input_ids": inputs["input_ids"][row : row + 1, kept]}
        if "pixel_values_videos" in inputs:
            single["pixel_values_videos"] = inputs["pixel_values_videos"][row : row + 1]
        alone = answers_of(speculate(model, single, None)[0], single)[0]
        assert batched[row][: len(alone)] == alone


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_the_prefill_pass_carries_the_first_tree(depth):
    model = tiny_llama(seed=0, eos=False)
    inputs = random_prompts(model, 1)
    answers = answers_of(plain(model, inputs), inputs)
    got, stats = speculate(model, inputs, OracleChainDrafter(answers, depth))
    assert answers_of(got, inputs) == answers
    assert stats.passes == math.ceil(NEW_TOKENS / (depth + 1))
    assert stats.tokens == NEW_TOKENS
    assert stats.tokens_per_pass == NEW_TOKENS / stats.passes


def test_forward_calls_are_the_passes_that_stats_count():
    model = tiny_llama(seed=0, eos=False)
    inputs = random_prompts(model, 1)
    answers = answers_of(plain(model, inputs), inputs)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    _, stats = speculate(model, inputs, OracleChainDrafter(answers, 4))
    handle.remove()
    assert len(calls) == stats.passes == NEW_TOKENS // 5


def test_images_and_text_only_prompts_of_video_llava():
    model = tiny_video_llava(seed=3)
    image = {k: v for k, v in _image_inputs(model).items()}
    for inputs in (image, random_prompts(model, 2)):
        expected = plain(model, inputs)
        drafter = OracleDrafter(answers_of(expected, inputs), vocab=100)
        assert torch.equal(speculate(model, inputs, drafter)[0], expected)


def _image_inputs(model):
    from tiny_models import image_inputs

    return image_inputs(model, 2)


def test_drafted_placeholders_and_unknown_ids_are_dropped():
    model = tiny_video_llava(seed=1)
    inputs = video_inputs(model, 1)
    expected = plain(model, inputs)
    answer = answers_of(expected, inputs)[0]

    class Foreign(OracleChainDrafter):
        def propose(self, state, max_nodes):
            tree = super().propose(state, max_nodes)
            roots = tree.tokens[:, 0].tolist()
            right = tree.tokens[0, 1:].tolist()
            return specfuse.TokenTree.from_sequences(
                roots, [[[model.config.video_token_index, 5], [10**6, 7], [-3], right]]
            )

    got, stats = speculate(model, inputs, Foreign([answer], depth=3))
    assert torch.equal(got, expected)
    assert stats.passes == math.ceil(len(answer) / 4)


def small_mistral(window: int, seed: int) -> MistralForCausalLM:
    from tiny_models import finish

    config = MistralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
    )
    return finish(MistralForCausalLM(config), seed, torch.float32, eos=True)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 3])
def test_sliding_window_attention(batch, implementation):
    model = small_mistral(window=6, seed=0)
    inputs = random_prompts(model, batch)
    model.set_attn_implementation(implementation)
    expected = plain(model, inputs)
    for max_nodes in (1, 7, 20):
        drafter = OracleDrafter(answers_of(expected, inputs), vocab=128, seed=1)
        assert torch.equal(speculate(model, inputs, drafter, max_nodes)[0], expected)
    assert torch.equal(speculate(model, inputs, None)[0], expected)


def test_layers_with_and_without_a_window():
    from tiny_models import finish
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
    )
    model = finish(Qwen2ForCausalLM(config), 0, torch.float64, eos=True)
    inputs = random_prompts(model, 2)
    expected = plain(model, inputs)
    drafter = OracleDrafter(answers_of(expected, inputs), vocab=128)
    assert torch.equal(speculate(model, inputs, drafter)[0], expected)


@pytest.mark.parametrize("name", MODELS)
def test_eager_attention(name):
    # fp32: with left padding, transformers' eager attention computes NaN in fp64 (its mask value overflows
    # in softmax).
    model = MODELS[name](seed=4)
    model.set_attn_implementation("eager")
    inputs = inputs_for(name, model, 2)
    expected = plain(model, inputs)
    drafter = OracleDrafter(answers_of(expected, inputs), vocab=100)
    assert torch.equal(speculate(model, inputs, drafter)[0], expected)


def test_learned_positions_up_to_the_last_one():
    config = GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    from tiny_models import finish

    model = finish(GPT2LMHeadModel(config), 0, torch.float64, eos=False)
    inputs = random_prompts(model, 1, text_lens=[11])
    expected = plain(model, inputs, max_new_tokens=20)
    drafter = OracleDrafter(answers_of(expected, inputs), vocab=128)
    assert torch.equal(speculate(model, inputs, drafter, 24, max_new_tokens=20)[0], expected)


def test_prompt_given_as_embeddings():
    model = tiny_llama(seed=0)
    ids = random_prompts(model, 1)["input_ids"]
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
    expected = plain(model, inputs)
    drafter = OracleDrafter(expected.tolist(), vocab=128)
    assert torch.equal(speculate(model, inputs, drafter)[0], expected)


@pytest.mark.parametrize("name", MODELS)
def test_continues_from_a_cache_and_returns_one_that_continues(name):
    model = MODELS[name](seed=0, dtype=torch.float64, eos=False)
    inputs = inputs_for(name, model, 2)
    kwargs = {"return_dict_in_generate": True, "max_new_tokens": 10}
    first_expected = plain(model, inputs, **kwargs)
    drafter = OracleDrafter(answers_of(first_expected.sequences, inputs), vocab=100)
    first, _ = speculate(model, inputs, drafter, **kwargs)
    assert type(first) is type(first_expected)
    assert isinstance(output_cache(first), DynamicCache)
    for ours, theirs in zip(output_cache(first).layers, output_cache(first_expected).layers, strict=True):
        kept = inputs["attention_mask"].bool()
        assert ours.keys.shape == theirs.keys.shape
        for row in range(2):
            real = torch.cat([kept[row], torch.ones(9, dtype=torch.bool)])
            torch.testing.assert_close(ours.keys[row][:, real], theirs.keys[row][:, real])
            torch.testing.assert_close(ours.values[row][:, real], theirs.values[row][:, real])
    longer = {
        "input_ids": first.sequences,
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(2, 10, dtype=torch.int64)], dim=1),
    }
    expected = plain(model, longer, **{GENERATE_CACHE: output_cache(first_expected)})
    drafter = OracleDrafter(answers_of(expected, longer), vocab=100)
    again, stats = speculate(model, longer, drafter, **{GENERATE_CACHE: output_cache(first)})
    assert torch.equal(again, expected)
    assert stats.tokens > stats.passes


def test_the_cache_grows_beyond_what_was_reserved(monkeypatch):
    monkeypatch.setattr(specfuse.run, "RESERVED_ANSWER", 2)
    model = tiny_llama(seed=0, eos=False)
    inputs = random_prompts(model, 2)
    expected = plain(model, inputs, max_new_tokens=80)
    drafter = OracleDrafter(answers_of(expected, inputs), vocab=128)
    assert torch.equal(speculate(model, inputs, drafter, 4, max_new_tokens=80)[0], expected)


def test_long_prompts_are_prefilled_without_a_tree(monkeypatch):
    monkeypatch.setattr(specfuse.run, "MAX_MASKED_PREFILL", 4)
    model = tiny_llama(seed=0, eos=False)
    inputs = random_prompts(model, 1)
    expected = plain(model, inputs)
    got, stats = speculate(model, inputs, OracleChainDrafter(answers_of(expected, inputs), 4))
    assert torch.equal(got, expected)
    assert stats.passes == 1 + math.ceil((NEW_TOKENS - 1) / 5)


def test_auto_remembers_per_model_object():
    model, other = tiny_llama(seed=0), tiny_llama(seed=1)
    inputs = random_prompts(model, 1)
    _, first = speculate(model, inputs, "auto")
    _, second = speculate(model, inputs, "auto")
    assert second.passes < first.passes
    _, elsewhere = speculate(other, inputs, "auto")
    assert elsewhere.passes > second.passes
    assert specfuse.auto_drafter(model) is not specfuse.auto_drafter(other)


@pytest.mark.parametrize("branching", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_copy_of_the_target_has_every_draft_accepted(batch, branching):
    """A Video-LLaVA used as drafter sees the video: its own copy is never wrong."""
    model = tiny_video_llava(seed=0, dtype=torch.float64, eos=False)
    inputs = video_inputs(model, batch)
    drafter = ModelDrafter(
        tiny_video_llava(seed=0, dtype=torch.float64, eos=False), branching=branching, depth=3
    )
    got, stats = speculate(model, inputs, drafter, max_nodes=64)
    assert torch.equal(got, plain(model, inputs))
    assert stats.passes == batch * NEW_TOKENS // 4
    if branching == 1:
        assert stats.tokens == stats.drafted + stats.passes


def test_a_draft_model_has_its_own_vision_tower():
    """The target's encoded pixels do not fit a drafter of another width: it must encode the clip itself."""
    model = tiny_video_llava(seed=0)
    inputs = video_inputs(model, 2)
    narrow = tiny_video_llava(seed=1, hidden=32, vision_hidden=16, layers=1)
    got, _ = speculate(model, inputs, ModelDrafter(narrow, depth=2))
    assert torch.equal(got, plain(model, inputs))


def test_a_draft_model_needs_pixels_under_custom_generate():
    model = tiny_video_llava(seed=0)
    inputs = video_inputs(model, 1)
    expected = plain(model, inputs)
    own = {"draft_inputs": dict(inputs)}
    drop_in = specfuse.custom_generate(ModelDrafter(model), **own)
    assert torch.equal(plain(model, inputs, custom_generate=drop_in), expected)
    if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        with pytest.raises(ValueError, match="pass draft_inputs"):
            plain(model, inputs, custom_generate=specfuse.custom_generate(ModelDrafter(model)))


def test_a_draft_model_without_the_video_guesses_worse():
    """Negative control of the test above: the same copy, shown another clip, is rejected."""
    model = tiny_video_llava(seed=0, dtype=torch.float64, eos=False)
    inputs = video_inputs(model, 1)
    other = video_inputs(model, 1, seed=7)
    other["input_ids"] = inputs["input_ids"]
    _, blind = speculate(model, inputs, ModelDrafter(model, inputs=other, depth=3))
    assert blind.passes > NEW_TOKENS // 4


def test_a_text_model_drafts_for_a_video_model():
    model = tiny_video_llava(seed=0)
    inputs = video_inputs(model, 2)
    got, _ = speculate(model, inputs, ModelDrafter(tiny_llama(seed=3, vocab=100), depth=3))
    assert torch.equal(got, plain(model, inputs))


def test_bf16_differs_from_generate_only_at_near_ties():
    """In bf16 a tree pass rounds differently; where the answers part, two logits were as good as equal."""
    parted = 0
    for seed in range(6):
        model = tiny_llama(seed=seed, dtype=torch.bfloat16, eos=False)
        inputs = random_prompts(model, 1, seed=seed)
        expected = answers_of(plain(model, inputs), inputs)[0]
        drafter = OracleDrafter([expected], vocab=128, seed=seed)
        got = answers_of(speculate(model, inputs, drafter)[0], inputs)[0]
        if got == expected:
            continue
        parted += 1
        step = next(i for i in range(NEW_TOKENS) if got[i] != expected[i])
        ids = torch.cat([inputs["input_ids"], torch.tensor([expected[:step]], dtype=torch.int64)], dim=1)
        top = model(ids).logits[0, -1].float().topk(2).values
        # bf16 keeps 8 bits of mantissa; the two passes may each be off by a few of those steps.
        step_size = 2.0 ** (math.floor(math.log2(float(top[0].abs()))) - 7)
        assert float(top[0] - top[1]) <= 4 * step_size, f"seed {seed}: {top.tolist()}"
    assert parted < 6


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_every_drafter_gives_the_tokens_of_generate(name, batch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = MODELS[name](seed=1, dtype=torch.float64).to("cuda")
    inputs = {k: v.to("cuda") for k, v in inputs_for(name, model, batch).items()}
    expected = plain(model, inputs)
    oracle = OracleDrafter(answers_of(expected, inputs), vocab=100)
    for drafter in (None, "auto", oracle, ModelDrafter(model, depth=3, branching=2)):
        assert torch.equal(speculate(model, inputs, drafter)[0], expected)
    sampled = {"do_sample": True, "seed": 3, "temperature": 1.2, "top_k": 30, "top_p": 0.95}
    assert torch.equal(
        speculate(model, inputs, oracle, **sampled)[0], speculate(model, inputs, None, **sampled)[0]
    )
    on_cpu = {k: v.cpu() for k, v in inputs.items()}
    assert torch.equal(speculate(model, on_cpu, oracle)[0].cpu(), expected.cpu())
