"""A step's host work in native code says what the Python definitions say; without it answers are the same."""

from __future__ import annotations

import random

import pytest
import torch
from scripted_drafters import RandomTreeDrafter
from tiny_models import random_prompts, tiny_llama
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

import specfuse
from specfuse.answers import Answers
from specfuse.ops import native
from specfuse.passes import tree_layout
from specfuse.passes.kv_cache import TreeCache
from specfuse.passes.step_mask import StepMask
from specfuse.tree import TokenTree, pack_bits

built = pytest.mark.skipif(native.step is None, reason="the C++ module is not built")


def random_trees(seed: int, batch: int = 5, width: int = 12) -> TokenTree:
    """Rows of 0 .. width nodes; siblings hold different tokens."""
    rng = random.Random(seed)
    tokens, parents = [], []
    for row in range(batch):
        count = width if row == 0 else rng.randrange(width + 1)
        tokens.append([100 + node for node in range(count)])
        parents.append([-1, *(rng.randrange(node) for node in range(1, count))][:count])
    return TokenTree.from_parents(tokens, parents)


@built
@pytest.mark.parametrize("width", [1, 2, 12, 64])
def test_positions_and_bits_are_those_of_the_tree(width):
    for seed in range(5):
        tree = random_trees(seed, width=width)
        roots = torch.arange(tree.batch_size) * 7
        assert torch.equal(tree_layout.node_positions(tree, roots), tree.positions(roots))
        expected = tree.positions(roots).clamp(max=9)
        assert torch.equal(tree_layout.node_positions(tree, roots, 9), expected)
        assert torch.equal(tree_layout.ancestor_bits(tree), pack_bits(tree.ancestor_mask()))


@built
def test_roots_of_other_rows_do_not_reach_native_code():
    tree = random_trees(0, batch=3)
    assert torch.equal(
        tree_layout.node_positions(tree, torch.tensor([4])), tree.positions(torch.tensor([4, 4, 4]))
    )
    with pytest.raises(RuntimeError):
        tree_layout.node_positions(tree, torch.tensor([4, 5]))


SOUND = ([[5, 6, 7, 8]], [[-1, 0, 0, 1]])
FAULTS = {
    "root with a parent": ([[5, 6, 7, 8]], [[0, 0, 0, 1]]),
    "parent behind its child": ([[5, 6, 7, 8]], [[-1, 2, 0, 1]]),
    "parent of itself": ([[5, 6, 7, 8]], [[-1, 0, 2, 1]]),
    "second root": ([[5, 6, 7, 8]], [[-1, 0, -1, 1]]),
    "missing parent": ([[5, 6, 7, 8]], [[-1, 0, 9, 1]]),
    "twins": ([[5, 6, 6, 8]], [[-1, 0, 0, 1]]),
}


@built
def test_sound_trees_are_those_that_validate_accepts():
    assert tree_layout.is_sound(TokenTree.from_parents(*SOUND))
    for name, (tokens, parents) in FAULTS.items():
        tree = TokenTree.from_parents(tokens, parents)
        with pytest.raises(ValueError):
            tree.validate()
        assert not tree_layout.is_sound(tree), name
    good = TokenTree.from_parents(*SOUND)
    for count in (-1, 5):
        assert not tree_layout.is_sound(good._replace(num_nodes=torch.tensor([count], dtype=torch.int32)))
    # Twins with different parents are none, nor is what lies in the padding.
    assert tree_layout.is_sound(TokenTree.from_parents([[5, 6, 7, 6]], [[-1, 0, 0, 1]]))
    assert tree_layout.is_sound(
        TokenTree.from_parents(*FAULTS["twins"])._replace(num_nodes=torch.tensor([2], dtype=torch.int32))
    )
    many = TokenTree.from_chains([1], [[7] * 900])
    assert tree_layout.is_sound(many)
    assert not tree_layout.is_sound(TokenTree.from_parents([[7] * 900], [[-1, *[0] * 899]]))


@built
@pytest.mark.parametrize("bad", ["dtype", "shape", "probs", "strides"])
def test_what_native_code_can_not_read_is_left_to_validate(bad):
    tree = TokenTree.from_parents(*SOUND)
    broken = {
        "dtype": tree._replace(parents=tree.parents.long()),
        "shape": tree._replace(parents=tree.parents[:, :2]),
        "probs": tree._replace(probs=torch.zeros(1, 3)),
        "strides": tree._replace(tokens=torch.stack([tree.tokens, tree.tokens], dim=2)[..., 0]),
    }[bad]
    assert not tree_layout.is_sound(broken)


def test_foreign_tokens_are_seen_with_and_without_native_code(monkeypatch):
    tree = TokenTree.from_parents([[300, 6, 7], [2]], [[-1, 0, 0], [-1]])
    for _ in range(2):
        assert not tree_layout.holds_foreign_tokens(tree, 8, {300}), "the root may be anything"
        assert tree_layout.holds_foreign_tokens(tree, 7, ())
        assert tree_layout.holds_foreign_tokens(tree, 8, {7})
        assert not tree_layout.holds_foreign_tokens(tree, None, ())
        negative = tree._replace(tokens=tree.tokens - 7)
        assert tree_layout.holds_foreign_tokens(negative, None, ())
        monkeypatch.setattr(native, "step", None)


@built
@pytest.mark.parametrize("padded", [False, True])
def test_the_kept_mask_is_the_mask_built_anew(padded):
    rng, batch, prompt = random.Random(0), 4, 6
    valid = None
    if padded:
        valid = torch.arange(prompt) >= torch.tensor([0, 2, 5, 1])[:, None]
    kept, lengths = StepMask(valid), [prompt - 1] * batch
    for step in range(40):
        tree = random_trees(step, batch, width=rng.choice([1, 3, 9, 17]))
        slots = max(lengths) + tree.width
        mask = kept.of(tree, lengths, slots, capacity=slots + 3)
        expected = torch.zeros(batch, tree.width, slots, dtype=torch.bool)
        for row, start in enumerate(lengths):
            expected[row, :, :start] = True
            if valid is not None:
                known = min(start, prompt)
                expected[row, :, :known] &= valid[row, :known]
            expected[row, :, start : start + tree.width] = tree.ancestor_mask()[row]
        assert torch.equal(mask, expected), step
        # Some rows stand still, and now and then one is rolled back.
        lengths = [max(prompt - 1, length + rng.randrange(-1, tree.width + 1)) for length in lengths]


@built
def test_a_kept_mask_begins_anew_with_other_rows_and_refuses_slots_outside():
    kept, tree = StepMask(None), random_trees(0, batch=3, width=4)
    assert kept.of(tree, [5, 6, 7], 11, 11).shape == (3, 4, 11)
    fewer = random_trees(1, batch=2, width=4)
    mask = kept.of(fewer, [6, 2], 10, 11)
    assert mask.shape == (2, 4, 10) and mask[1, :, :2].all() and not mask[1, :, 6:].any()
    for lengths, slots in [([6, 2, 3], 10), ([6], 10), ([7, 2], 10), ([-1, 2], 10)]:
        with pytest.raises(ValueError, match="mask"):
            kept.of(fewer, lengths, slots, 11)
    with pytest.raises(ValueError, match="one per row"):
        native.step.write_rows([], [], (2, 1, 1, 4), [0])


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_ragged_rows_are_written_where_indexing_puts_them(dtype, transposed, monkeypatch):
    torch.manual_seed(0)
    caches = []
    for by_memcpy in (True, False):
        torch.manual_seed(1)
        cache = TreeCache(1, 3, 16)
        cache.update(torch.randn(3, 2, 4, 5).to(dtype), torch.randn(3, 2, 4, 5).to(dtype), 0)
        cache.set_lengths([4, 2, 3])
        if not by_memcpy:
            monkeypatch.setattr(native, "step", None)
        for count in (2, 3):
            new = [torch.randn(3, count, 2, 5).to(dtype).transpose(1, 2) for _ in "kv"]
            cache.update(*(x if transposed else x.contiguous() for x in new), 0)
        caches.append(cache.layers[0])
    assert caches[0].keys.abs().sum() > 0
    assert torch.equal(caches[0].keys, caches[1].keys)
    assert torch.equal(caches[0].values, caches[1].values)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "specfuse_tree"])
def test_answers_are_the_same_without_native_code(batch, attention, monkeypatch):
    model = tiny_llama(seed=3)
    model.set_attn_implementation(attention)
    inputs = {**random_prompts(model, batch), "max_new_tokens": 24, "do_sample": False}
    expected = model.generate(**inputs)
    for _ in range(2):
        assert torch.equal(specfuse.generate(model, RandomTreeDrafter(128), **inputs), expected)
        monkeypatch.setattr(native, "step", None)


class Never:
    """A criterion that never stops anything, but has to be asked after every token."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_tokens_of_a_pass_are_taken_as_one_by_one():
    rng = random.Random(0)
    for _ in range(200):
        longest, width = rng.randrange(3, 12), rng.randrange(1, 6)
        criteria = [MaxLengthCriteria(max_length=longest)]
        if rng.random() < 0.8:
            criteria.append(EosTokenCriteria(eos_token_id=torch.tensor([0, 1])))
        config = GenerationConfig(max_length=longest, pad_token_id=0)
        config._pad_token_tensor = torch.tensor(0)
        prompt = torch.ones(1, 3, dtype=torch.int64)
        together = Answers(prompt, StoppingCriteriaList(criteria), config)
        singly = Answers(prompt, StoppingCriteriaList([*criteria, Never()]), config)
        assert len(singly.others) == 1 and not len(together.others)
        while not all(singly.finished):
            tokens = [rng.randrange(9) for _ in range(width)]
            assert together.append(0, tokens, 0) == singly.append(0, tokens, 0)
            assert together.answers == singly.answers and together.finished == singly.finished
