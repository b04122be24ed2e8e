"""PromptTreeMask: attention is that of the dense mask, to every other operation it is the dense tensor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specfuse.passes.prompt_mask import PromptTreeMask


def prompt_and_tree(prompt: int, drafted: int, batch: int = 2) -> torch.Tensor:
    total = prompt + drafted
    mask = torch.ones(total, total, dtype=torch.bool).tril().repeat(batch, 1, 1, 1)
    tree = torch.rand(drafted, drafted, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[:, :, prompt:, prompt:] = tree | torch.eye(drafted, dtype=torch.bool)
    return mask


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("prompt", "drafted"), [(1, 1), (17, 5), (64, 32)])
def test_attention_equals_the_dense_mask(prompt, drafted, grouped):
    mask = prompt_and_tree(prompt, drafted)
    heads = 2 if grouped else 4
    query = torch.randn(2, 4, prompt + drafted, 16, dtype=torch.float64)
    key, value = torch.randn(2, 2, heads, prompt + drafted, 16, dtype=torch.float64)
    options = {"enable_gqa": True} if grouped else {"scale": 0.3}
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    wrapped = PromptTreeMask.wrap(mask, prompt)
    got = F.scaled_dot_product_attention(query, key, value, attn_mask=wrapped, **options)
    torch.testing.assert_close(got, expected)
    assert type(got) is torch.Tensor


def test_the_prompt_goes_through_the_causal_kernel(monkeypatch):
    calls = []
    plain = F.scaled_dot_product_attention

    def counting(query, key, value, **options):
        calls.append((query.shape[2], options.get("is_causal")))
        return plain(query, key, value, **options)

    x = torch.randn(1, 1, 12, 8)
    wrapped = PromptTreeMask.wrap(prompt_and_tree(9, 3, batch=1), 9)
    monkeypatch.setattr("specfuse.passes.prompt_mask.F.scaled_dot_product_attention", counting)
    PromptTreeMask.__torch_function__(
        counting, (PromptTreeMask,), (x, x, x), {"attn_mask": wrapped, "dropout_p": 0.0}
    )
    assert calls == [(9, True), (3, False)]


def test_a_slice_is_an_ordinary_mask():
    mask = prompt_and_tree(6, 2)
    rows = PromptTreeMask.wrap(mask, 6)[:, :, 3:]
    assert type(rows) is torch.Tensor and torch.equal(rows, mask[:, :, 3:])


def test_other_lengths_fall_back_to_the_dense_mask():
    """Cached rows bring fewer queries than the mask has rows: nothing may be read as causal."""
    mask = prompt_and_tree(6, 2, batch=1)
    x = torch.randn(1, 1, 8, 4)
    narrow = mask[..., :1, :]
    wrapped = PromptTreeMask.wrap(mask.clone(), 6)
    got = F.scaled_dot_product_attention(x[:, :, :1], x, x, attn_mask=wrapped[..., :1, :])
    torch.testing.assert_close(got, F.scaled_dot_product_attention(x[:, :, :1], x, x, attn_mask=narrow))
