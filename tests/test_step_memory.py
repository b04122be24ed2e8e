"""A step neither allocates nor copies the KV of the prefix."""

from __future__ import annotations

import pytest
import torch
from scripted_drafters import OracleChainDrafter
from tiny_models import random_prompts, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import specfuse
import specfuse.run
from specfuse.passes.kv_cache import TreeCacheLayer

PROMPT = 400


class Watcher(TorchDispatchMode):
    """The most bytes that one operation has written to memory of its own."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.nbytes)
        return result


def largest_of_steps(monkeypatch, attention: str, kv_heads: int) -> tuple[int, int, int]:
    """Bytes of the largest new tensor behind the prompt's pass, and of a layer's keys; buffers allocated."""
    model = tiny_llama(seed=0, eos=False, kv_heads=kv_heads)
    model.set_attn_implementation(attention)
    inputs = {**random_prompts(model, 1, text_lens=[PROMPT]), "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(**inputs)
    right = expected[:, inputs["input_ids"].shape[1] :].tolist()
    watcher, allocated = Watcher(), []
    allocate, step = TreeCacheLayer._allocate, specfuse.run.GenerationRun.step
    monkeypatch.setattr(
        TreeCacheLayer, "_allocate", staticmethod(lambda *a: (allocated.append(1), allocate(*a))[1])
    )

    def watched(self, tree):
        with watcher:
            return step(self, tree)

    monkeypatch.setattr(specfuse.run.GenerationRun, "step", watched)
    drafter = OracleChainDrafter(right, depth=3)
    assert torch.equal(specfuse.generate(model, drafter, max_nodes=4, **inputs), expected)
    assert watcher.largest > 0
    return watcher.largest, kv_heads * PROMPT * 16 * 4, len(allocated)


@pytest.mark.parametrize(("attention", "kv_heads"), [("sdpa", 4), ("specfuse_tree", 4), ("specfuse_tree", 2)])
def test_a_step_makes_nothing_of_the_size_of_the_prefix(monkeypatch, attention, kv_heads):
    largest, prefix, allocated = largest_of_steps(monkeypatch, attention, kv_heads)
    assert largest < prefix
    assert allocated == 2 * 2, "keys and values of two layers, once"


def test_what_transformers_repeats_is_seen(monkeypatch):
    """Grouped heads under sdpa and a mask: transformers repeats keys and values (use specfuse_tree)."""
    largest, prefix, _ = largest_of_steps(monkeypatch, "sdpa", 2)
    assert largest > prefix
