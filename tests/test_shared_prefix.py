"""Attention to a prefix that is stored once equals attention to a copy of it in every row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import random_prompts, tiny_llama
from torch import Tensor
from transformers import DynamicCache

import specfuse
from specfuse.hf.cache_names import GENERATE_CACHE
from specfuse.passes.row_pool import RowPool
from specfuse.passes.shared_prefix import SharedPrefix, SharedPrefixMask
from specfuse.stream import AnswerStream


class Cache:
    layer_now = 1


def case(B: int, H: int, G: int, N: int, P: int, S: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(B * 1000 + N * 10 + P)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.rand((B, 1, N, S), generator=generator) < 0.6
    mask[..., -1] = True
    mask[0, :, 0] = False  # a node that sees the prefix alone
    return {
        "query": draw(B, H, N, 16),
        "keys": draw(1, G, P, 16),
        "values": draw(1, G, P, 16),
        "key": draw(B, G, S, 16),
        "value": draw(B, G, S, 16),
        "mask": mask,
    }


def dense(x: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The definition: every row has its own copy of the prefix."""
    B, H = x["query"].shape[:2]
    groups = H // x["key"].shape[1]
    k, v = (
        torch.cat([x[shared].expand(B, -1, -1, -1), x[own]], dim=2).repeat_interleave(groups, 1).to(dtype)
        for shared, own in (("keys", "key"), ("values", "value"))
    )
    seen = torch.ones((B, 1, x["query"].shape[2], x["keys"].shape[2]), dtype=torch.bool)
    return F.scaled_dot_product_attention(
        x["query"].to(dtype), k, v, attn_mask=torch.cat([seen, x["mask"]], dim=3), scale=0.3
    )


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4, 4, 1, 1, 1), (3, 4, 2, 5, 37, 9), (2, 8, 1, 17, 64, 31)])
def test_merged_attention_is_that_of_copies(
    shape: tuple[int, ...], dtype: torch.dtype, repeated: bool
) -> None:
    x = case(*shape, dtype=dtype)  # type: ignore[arg-type]
    other = (torch.zeros_like(x["keys"]), torch.zeros_like(x["values"]))
    mask = SharedPrefixMask.wrap(x["mask"], SharedPrefix([other, (x["keys"], x["values"])]), Cache)
    key, value = x["key"], x["value"]
    groups = shape[1] // shape[2]
    options: dict[str, Any] = {"enable_gqa": groups > 1}
    if repeated:  # transformers repeats kv heads where sdpa does not
        key, value, options = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), {}
    out = F.scaled_dot_product_attention(
        x["query"], key, value, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=0.3, **options
    )
    assert out.dtype == dtype and mask.readers == {1}
    truth = dense(x, torch.float64)
    error, eager = (out.double() - truth).abs().max(), (dense(x, dtype).double() - truth).abs().max()
    assert error <= 2 * eager + 1e-6 * (dtype != torch.float64) + 1e-14


def test_the_mask_is_an_ordinary_tensor_elsewhere_and_says_when_it_was_not_read() -> None:
    x = case(1, 2, 2, 2, 4, 3, torch.float32)
    mask = SharedPrefixMask.wrap(x["mask"], SharedPrefix([(x["keys"], x["values"])] * 2), Cache)
    assert type(mask[:, :, :1]) is Tensor and bool(mask.any())
    with pytest.raises(RuntimeError, match="0 of 2 layers attended to the shared prefix"):
        mask.check_read(2)


def test_models_that_can_not_share_are_refused() -> None:
    model = tiny_llama(seed=1)
    model.set_attn_implementation("eager")
    prefix = SharedPrefix([(torch.zeros(1, 2, 4, 16),) * 2] * 2)
    with pytest.raises(ValueError, match="only sdpa without sliding windows"):
        RowPool(model, 2, prefix)


@pytest.mark.parametrize("attention", ["sdpa", specfuse.register_attention()])
def test_requests_behind_one_prefix_answer_as_they_do_alone(attention: str) -> None:
    model = tiny_llama(seed=7, layers=3, eos=False)
    model.set_attn_implementation(attention)
    start = random_prompts(model, 1, seed=1, text_lens=[40])["input_ids"]
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=start, **{GENERATE_CACHE: cache})
    prefix = SharedPrefix([(layer.keys, layer.values) for layer in cache.layers])
    requests = []
    for i in range(7):
        ids = torch.cat([start, random_prompts(model, 1, seed=i, text_lens=[1 + i])["input_ids"]], dim=1)
        requests.append(
            {"input_ids": ids, "max_new_tokens": 4 + 3 * i, "attention_mask": torch.ones_like(ids)}
        )
    expected = [model.generate(**request) for request in requests]

    def with_past() -> Any:
        for request in requests:
            past = DynamicCache()
            for i, (keys, values) in enumerate(prefix.layers):
                past.update(keys, values, i)
            yield {**request, GENERATE_CACHE: past}

    generator = specfuse.SpeculativeGenerator(model, specfuse.ModelDrafter(model, depth=3, branching=2))
    for answer in AnswerStream(generator, with_past(), batch_size=3, prefix=prefix):
        assert answer.error is None and torch.equal(answer.sequences, expected[answer.id])  # type: ignore[arg-type]
