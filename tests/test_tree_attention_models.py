"""attn_implementation="specfuse_tree": model.generate is sdpa's, speculation is model.generate's."""

from __future__ import annotations

import copy

import pytest
import torch
from scripted_drafters import OracleDrafter, RandomTreeDrafter
from tiny_models import finish, random_prompts, tiny_llama, tiny_qwen2, tiny_video_llava, video_inputs
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import specfuse
from specfuse import ModelDrafter
from specfuse.hf.cache_names import GENERATE_CACHE, output_cache
from specfuse.passes import attention
from specfuse.passes.attention import TreeMask
from specfuse.passes.tree_forward import TreeForward

NEW_TOKENS = 16
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def gpt2(seed: int) -> PreTrainedModel:
    config = GPT2Config(vocab_size=128, n_positions=128, n_embd=64, n_layer=2, n_head=4)
    return finish(GPT2LMHeadModel(config), seed, torch.float32, eos=True)


def mistral(seed: int, window: int = 6) -> PreTrainedModel:
    config = MistralConfig(**SIZES, sliding_window=window)
    return finish(MistralForCausalLM(config), seed, torch.float32, eos=True)


def half_windowed(seed: int, window: int = 5) -> PreTrainedModel:
    config = Qwen2Config(
        **SIZES,
        use_sliding_window=True,
        sliding_window=window,
        layer_types=["full_attention", "sliding_attention"],
    )
    return finish(Qwen2ForCausalLM(config), seed, torch.float32, eos=True)


MODELS = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "mistral": mistral,
    "half windowed": half_windowed,
    "gpt2": gpt2,
    "video_llava": tiny_video_llava,
}


def model_and_inputs(name: str, batch: int, seed: int = 0) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model = MODELS[name](seed=seed)
    if name == "video_llava":
        return model, video_inputs(model, batch, seed=seed)
    return model, random_prompts(model, batch, seed=seed)


def plain(model: PreTrainedModel, inputs: dict[str, Tensor], **options: object) -> Tensor:
    return model.generate(**inputs, **({"max_new_tokens": NEW_TOKENS, "do_sample": False} | options))


def answers_of(sequences: Tensor, inputs: dict[str, Tensor]) -> list[list[int]]:
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(nodes, tail) of every call of the op from a model."""
    seen: list[tuple[int, int]] = []
    op = attention.tree_attention

    def counting(query: Tensor, *args: Tensor, **options: object) -> Tensor:
        seen.append((query.shape[2], options["tail"]))
        return op(query, *args, **options)

    monkeypatch.setattr(attention, "tree_attention", counting)
    return seen


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_generate_is_that_of_sdpa(name, batch, cache, calls):
    model, inputs = model_and_inputs(name, batch)
    options = {} if cache is None else {"cache_implementation": cache}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = plain(model, inputs, **options)
    model.set_attn_implementation("specfuse_tree")
    got = plain(model, inputs, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))
    assert calls == []


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_speculation_is_generate(name, batch, calls):
    for seed in range(2):
        model, inputs = model_and_inputs(name, batch, seed)
        expected = plain(model, inputs)
        model.set_attn_implementation("specfuse_tree")
        for max_nodes in (2, 8, 31, 64):
            drafter = OracleDrafter(answers_of(expected, inputs), vocab=120, seed=max_nodes)
            generator = specfuse.SpeculativeGenerator(model, drafter, max_nodes=max_nodes)
            got = generator.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            assert torch.equal(got, expected), f"seed {seed}, max_nodes {max_nodes}"
            assert generator.last_stats.tokens > generator.last_stats.passes
    # A model whose layers all have a window keeps the dense mask; the other half of a mixed one as well.
    assert (calls == []) == (name == "mistral")


@pytest.mark.parametrize("window", [18, 23, 64])
@pytest.mark.parametrize("build", [mistral, half_windowed])
def test_a_window_counts_from_where_it_hides_something(build, window, calls, monkeypatch):
    """Rows of 8 to 17 tokens grow by 16: past the first windows midway, never past the last."""
    dense = []
    finish_mask = TreeForward._finish_mask
    monkeypatch.setattr(TreeForward, "_finish_mask", lambda *a: dense.append(1) or finish_mask(*a))
    for batch in (1, 4):
        model = build(0, window)
        inputs = random_prompts(model, batch)
        expected = plain(model, inputs)
        model.set_attn_implementation("specfuse_tree")
        for drafter in (
            OracleDrafter(answers_of(expected, inputs), vocab=120),
            ModelDrafter(model, depth=3, branching=2),
        ):
            prefills = len(dense)
            generator = specfuse.SpeculativeGenerator(model, drafter, max_nodes=4)
            got = generator.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            assert torch.equal(got, expected)
            assert window < 64 or len(dense) <= prefills + 2
    assert calls and dense


@pytest.mark.parametrize("implementation", ["specfuse_tree", "sdpa", "eager"])
@pytest.mark.parametrize("build", [mistral, half_windowed])
def test_a_window_counts_slots_not_position_ids(build, implementation):
    """Masked tokens inside the prompt and positions of the caller's own, as transformers counts them."""
    model = build(0)
    inputs = random_prompts(model, 2)
    inputs["attention_mask"][0, 6] = 0
    inputs["attention_mask"][1, [2, 5]] = 0
    shifted = 3 * torch.arange(inputs["input_ids"].shape[1]).expand(2, -1)
    for options in ({}, {"position_ids": shifted}):
        model.set_attn_implementation("sdpa")
        expected = plain(model, inputs | options)
        model.set_attn_implementation(implementation)
        drafter = OracleDrafter(answers_of(expected, inputs), vocab=120)
        for chosen in (None, drafter):
            generator = specfuse.SpeculativeGenerator(model, chosen, max_nodes=16)
            got = generator.generate(**inputs, **options, max_new_tokens=NEW_TOKENS, do_sample=False)
            assert torch.equal(got, expected)


@pytest.mark.parametrize("build", [mistral, half_windowed])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cache_that_has_dropped_what_is_outside_the_window(build, batch):
    """transformers' cache keeps window - 1 slots of a sliding layer; a conversation goes on from there."""
    model = build(0)
    first = plain(model, random_prompts(model, batch), return_dict_in_generate=True, eos_token_id=None)
    inputs = {"input_ids": torch.cat([first.sequences, torch.full((batch, 2), 9)], dim=1)}
    padding = random_prompts(model, batch)["attention_mask"]
    inputs["attention_mask"] = torch.nn.functional.pad(padding, (0, NEW_TOKENS + 2), value=1)
    past = output_cache(first)
    assert past.layers[-1].keys.shape[2] < past.get_seq_length()
    expected = plain(model, inputs, **{GENERATE_CACHE: copy.deepcopy(past)})
    drafter = OracleDrafter(answers_of(expected, inputs), vocab=120)
    for implementation in ("specfuse_tree", "sdpa"):
        model.set_attn_implementation(implementation)
        for chosen in (None, drafter):
            generator = specfuse.SpeculativeGenerator(model, chosen, max_nodes=16)
            options = {GENERATE_CACHE: copy.deepcopy(past), "max_new_tokens": NEW_TOKENS}
            assert torch.equal(generator.generate(**inputs, **options, do_sample=False), expected)
    past.layers[-1].keys = past.layers[-1].keys[:, :, 1:]
    with pytest.raises(ValueError, match=r"past_key_values holds \d of its \d+ tokens in layer 1"):
        generator.generate(**inputs, **{GENERATE_CACHE: past}, max_new_tokens=2, do_sample=False)


def test_useless_drafts_and_a_draft_model_with_pending_nodes(calls):
    model, inputs = model_and_inputs("llama", 3)
    expected = plain(model, inputs)
    drafter = tiny_llama(seed=9)
    for m in (model, drafter):
        m.set_attn_implementation("specfuse_tree")
    for chosen in (RandomTreeDrafter(vocab=128), ModelDrafter(drafter, depth=3, branching=3), None):
        generator = specfuse.SpeculativeGenerator(model, chosen, max_nodes=16)
        got = generator.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(got, expected)
    assert any(tail > nodes for nodes, tail in calls), "levels of a draft tree see the levels before"
    assert (1, 1) in calls, "single nodes of padded rows"


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_tree_are_those_of_the_dense_mask(name):
    """Ragged rows and left padding, down to the logits of every node, bits against dense mask."""
    model, inputs = model_and_inputs(name, 3)
    tree = specfuse.TokenTree.from_parents([[5, 6, 7, 8, 9, 10]] * 3, [[-1, 0, 0, 1, 2, 2]] * 3)
    results = []
    for implementation in ("sdpa", "specfuse_tree"):
        model.set_attn_implementation(implementation)
        forward = TreeForward(model, 3, 256)
        with torch.no_grad():
            prompt = {k: v for k, v in inputs.items() if k != "attention_mask"}
            forward.prefill(prompt, inputs["attention_mask"])
            width = inputs["input_ids"].shape[1]
            roots = inputs["attention_mask"].sum(1) - 1
            forward.forward_tree(tree, roots)
            forward.commit(torch.tensor([[0, 1, 3], [0, 2, -1], [0, -1, -1]], dtype=torch.int32),
                           torch.tensor([3, 2, 1], dtype=torch.int32), [3, 2, 1])  # fmt: skip
            assert forward.cache.lengths == [width + 2, width + 1, width]
            results.append(forward.forward_tree(tree, roots + torch.tensor([3, 2, 1])))
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_clips_from_the_vision_cache(batch, calls):
    """The video's KV comes from the cache, trees ride behind the rest of the prompt and after it."""
    model = tiny_video_llava(seed=3)
    asked = [video_inputs(model, batch, seed=3, question_seed=s, clips=[0] * batch) for s in (1, 2)]
    expected = [plain(model, inputs) for inputs in asked]
    model.set_attn_implementation("specfuse_tree")
    with specfuse.patched(model) as cache:
        for inputs, answer in zip(asked, expected, strict=True):
            drafter = OracleDrafter(answers_of(answer, inputs), vocab=120)
            generator = specfuse.SpeculativeGenerator(model, drafter, max_nodes=16)
            got = generator.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            assert torch.equal(got, answer)
    assert cache.stats.hits >= batch and calls


def step_masks(model: PreTrainedModel, nodes: int, mask: Tensor | None = None) -> object:
    """What a pass over ``nodes`` nodes hands to the layers."""
    inputs = random_prompts(model, 2)
    forward = TreeForward(model, 2, 256)
    padding = inputs["attention_mask"] if mask is None else mask
    with torch.no_grad():
        forward.prefill({"input_ids": inputs["input_ids"]}, padding)
    tail = torch.ones(nodes, nodes, dtype=torch.bool).tril().expand(2, -1, -1)
    return forward._step_mask(tail, 10 + torch.arange(nodes).expand(2, -1))


def test_a_tree_pass_builds_no_dense_mask():
    model = tiny_llama(seed=0)
    assert step_masks(model, 3).shape == (2, 1, 3, 13)
    model.set_attn_implementation("specfuse_tree")
    mask = step_masks(model, 3)
    assert isinstance(mask, TreeMask) and mask.shape == (2, 1, 3, 1)
    assert mask.bits().tolist() == [[1, 3, 7]] * 2
    assert mask.starts.tolist() == [3, 0] and mask.lengths.tolist() == [10, 10]
    assert step_masks(model, 64).bits()[0, 63] == -1
    assert step_masks(model, 65).dtype == torch.bool, "too many nodes for a word"
    holes = torch.tensor([[1] * 11, [1, 0] + [1] * 9])
    assert step_masks(model, 3, holes).dtype == torch.bool, "not left padding"
    mixed = half_windowed(0)
    mixed.set_attn_implementation("specfuse_tree")
    masks = step_masks(mixed, 3)
    assert isinstance(masks["full_attention"], TreeMask)
    assert masks["sliding_attention"].dtype == torch.bool
    # Nodes at positions 10, 11 and 12: a window of 12 hides key 0 from the last one, one of 13 hides nothing.
    for window, kind in ((12, torch.bool), (13, torch.int64)):
        windowed = mistral(0, window)
        windowed.set_attn_implementation("specfuse_tree")
        assert step_masks(windowed, 3).dtype == kind


def test_a_tree_mask_taken_for_a_dense_one_fails():
    model = tiny_llama(seed=0)
    model.set_attn_implementation("specfuse_tree")
    mask = step_masks(model, 3)
    assert type(mask[:, :, :, :1]) is Tensor
    q = torch.randn(2, 4, 3, 16)
    with pytest.raises(RuntimeError, match="attn_mask"):
        torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def test_what_tree_attention_can_not_do_is_said():
    model = tiny_llama(seed=0)
    module, q = model.model.layers[0].self_attn, torch.randn(1, 4, 1, 16)
    kv = torch.randn(1, 2, 3, 16)
    mask = TreeMask.wrap(torch.ones(1, 1, dtype=torch.int64), torch.tensor([2]), None, 1, 2)
    forward = attention.tree_attention_forward
    assert forward(module, q, kv, kv, mask, scaling=0.25)[0].shape == (1, 1, 4, 16)
    with pytest.raises(ValueError, match="softcap"):
        forward(module, q, kv, kv, mask, softcap=30.0)
    with pytest.raises(ValueError, match="one head dim in a tree pass, got 16 and 8"):
        forward(module, q, kv, kv[..., :8], mask)
    for some_mask in (mask, None):
        with pytest.raises(ValueError, match="attention sinks"):
            forward(module, q, kv, kv, some_mask, s_aux=torch.zeros(4))


@torch.no_grad()
def test_a_model_that_ignores_the_interface_is_refused(monkeypatch):
    model = tiny_llama(seed=0)
    model.set_attn_implementation("specfuse_tree")
    forward = TreeForward(model, 2, 64)
    tree = specfuse.TokenTree.from_parents([[5, 6]] * 2, [[-1, 0]] * 2)
    forward.forward_tree(tree, torch.tensor([0, 0]))
    monkeypatch.setattr(forward, "_call", lambda **inputs: torch.zeros(2, 2, 128))
    with pytest.raises(ValueError, match="does not attend through transformers' AttentionInterface"):
        forward.forward_tree(tree, torch.tensor([0, 0]))


def test_flash_attention_models_are_told_what_to_use():
    model = tiny_llama(seed=0)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2' of .* takes no tree mask; .*'specfuse_tree'"):
        TreeForward(model, 1, 16)


def test_registration_names_what_transformers_knows():
    name = specfuse.register_attention()
    config = tiny_llama(seed=0).config
    config._attn_implementation = name
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM._from_config(config, attn_implementation=name).config._attn_implementation == name
