"""Adapters: the equations of their docstrings, files in Hugging Face's form, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adapter_kinds import SAMPLES, B, C, D, V, build
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from specfuse.adapters import (
    KINDS,
    CompressionDrafter,
    CompressionDrafterConfig,
    CrossAttentionAligner,
    CrossAttentionAlignerConfig,
    LightweightAdapter,
    LightweightAdapterConfig,
    LinearAdapter,
    ResidualMLPAdapter,
    TokenAlignmentAdapter,
    TokenAlignmentAdapterConfig,
    TokenExpander,
    TokenExpanderConfig,
    kind_of,
    load_adapter,
)
from specfuse.models.checkpoint import read_config

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_a_directory_brings_the_same_adapter_back(kind: str, tmp_path: Path) -> None:
    adapter = build(kind, seed=1)
    inputs = SAMPLES[kind].inputs()
    with torch.no_grad():
        expected = adapter(*inputs)
        assert expected.shape == SAMPLES[kind].shape
        assert not torch.equal(expected, build(kind)(*inputs))
        adapter.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").exists()
        for loaded in (
            load_adapter(tmp_path),
            AutoModel.from_pretrained(tmp_path),
            KINDS[kind].from_pretrained(tmp_path),
        ):
            assert type(loaded) is KINDS[kind] and kind_of(loaded) == kind and not loaded.training
            assert torch.equal(loaded(*inputs), expected)


@every_kind
def test_gradients_reach_every_parameter(kind: str) -> None:
    adapter = build(kind, seed=2).train()
    adapter(*SAMPLES[kind].inputs()).square().sum().backward()
    assert [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_kind
def test_missing_weights_start_as_untrained_ones_and_load_adapter_refuses_them(
    kind: str, tmp_path: Path
) -> None:
    adapter = build(kind, seed=3)
    state = adapter.state_dict()
    name = next(reversed(state))
    adapter.save_pretrained(tmp_path, state_dict={k: v for k, v in state.items() if k != name})
    loaded = KINDS[kind].from_pretrained(tmp_path).state_dict()
    assert loaded[name].isfinite().all() and not torch.equal(loaded[name], state[name])
    assert all(torch.equal(loaded[k], v) for k, v in state.items() if k != name)
    with pytest.raises(ValueError, match=f"do not fit the adapter: {name}"):
        load_adapter(tmp_path)


def test_sizes_of_the_published_study() -> None:
    with torch.device("meta"):
        pixels = LightweightAdapter(LightweightAdapterConfig(features=150_528))
        aligner = CrossAttentionAligner(CrossAttentionAlignerConfig())
        assert pixels(torch.empty(2, 150_528)).shape == (2, 150_528)
        assert aligner(torch.empty(1, 582, 4096), torch.empty(1, 257, 1024)).shape == (1, 582, 4096)
        assert CompressionDrafterConfig().horizon == 16 and TokenExpanderConfig().factor == 4
    # 2 x 150,528 x 512 + 512 x 512, and biases and norms: the study's "about 154 M".
    assert pixels.num_parameters() == 2 * 150_528 * 512 + 512**2 + 150_528 + 6 * 512
    assert pixels.config.dropout == 0.1 and aligner.config.heads == 32


def test_lightweight_equation_and_dropout() -> None:
    adapter = build("lightweight", seed=4)
    x = torch.randn(40, D)
    (A, a, g1, s1, M, b, g2, s2, U, c) = adapter.weights()

    def norm(h, gain, shift):
        h = h - h.mean(-1, keepdim=True)
        return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + shift

    h = norm(x @ A.T + a, g1, s1).clamp(min=0)
    expected = x + norm(h @ M.T + b, g2, s2).clamp(min=0) @ U.T + c
    torch.testing.assert_close(adapter(x), expected)
    adapter.train()
    assert not torch.equal(adapter(x), adapter(x))


def test_cross_attention_equation_with_padding() -> None:
    adapter = build("cross-attention", seed=5)
    x, context = SAMPLES["cross-attention"].inputs()
    mask = torch.ones(B, 6, dtype=torch.bool)
    mask[1, 4:] = False
    expected = torch.zeros(B, 5, D)
    n = F.layer_norm(x, (D,), adapter.norm.weight, adapter.norm.bias)
    m = F.layer_norm(context, (C,), adapter.context_norm.weight, adapter.context_norm.bias)
    own, other = adapter.query_places.weight, adapter.key_places.weight
    q, k, v = adapter.query(n + own), adapter.key(m + other), adapter.value(m)
    width = D // 3
    for row in range(B):
        seen = mask[row].nonzero()[:, 0]
        for head in range(3):
            part = slice(head * width, (head + 1) * width)
            weights = (q[row, :, part] @ k[row, seen, part].T / math.sqrt(width)).softmax(-1)
            expected[row, :, part] = weights @ v[row, seen, part]
    expected = adapter.project(x) + adapter.out(expected) + adapter.out_places.weight
    torch.testing.assert_close(adapter(x, context, mask), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(adapter(x, context), expected, atol=1e-3)


def test_untrained_aligner_and_token_adapter_change_nothing() -> None:
    for kind in ("cross-attention", "token-alignment"):
        inputs = SAMPLES[kind].inputs()
        assert torch.equal(build(kind)(*inputs), inputs[0])


def test_expander_equation_and_start() -> None:
    adapter = build("expander", seed=6)
    (x,) = SAMPLES["expander"].inputs()
    y = adapter(x)
    for token in range(5):
        base = adapter.project(x[:, token])
        added = adapter.up(F.gelu(adapter.down(x[:, token]) + adapter.places.weight[token]))
        for k in range(4):
            torch.testing.assert_close(y[:, 4 * token + k], base + added[:, 8 * k : 8 * (k + 1)])
    same = TokenExpander(TokenExpanderConfig(in_features=D, width=3, factor=2))
    assert same.places is None and torch.equal(same(x), x.repeat_interleave(2, 1))


def test_without_places_any_number_of_tokens_is_read() -> None:
    aligner = CrossAttentionAligner(CrossAttentionAlignerConfig(features=D, context_features=C, heads=3))
    assert aligner(torch.randn(2, 9, D), torch.randn(2, 1, C)).shape == (2, 9, D)
    assert all("places" not in name for name in aligner.state_dict())


def test_token_alignment_is_a_matrix_that_is_never_built() -> None:
    adapter = build("token-alignment", seed=7)
    x = torch.randn(4, V)
    centre = torch.eye(V) - 1 / V
    matrix = torch.eye(V) + adapter.up.weight @ adapter.down.weight @ centre
    torch.testing.assert_close(adapter(x), x @ matrix.T + adapter.up.bias, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(adapter(x + 3) - adapter(x), torch.full((4, V), 3.0), atol=1e-4, rtol=1e-4)

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    wide = TokenAlignmentAdapter(TokenAlignmentAdapterConfig(rank=4)).requires_grad_(False)
    with Sizes():
        wide(torch.zeros(2, 32000))
    assert 2 * 32000 <= largest <= 4 * 32000


def test_compression_drafter_reads_states_and_text_in_order() -> None:
    adapter = build("compression", seed=8)
    states, tokens = SAMPLES["compression"].inputs()
    logits = adapter(states, tokens)
    assert torch.equal(adapter.draft(states, tokens), logits.argmax(-1))
    assert not torch.allclose(adapter(states.flip(0), tokens)[0], logits[0])
    assert not torch.allclose(adapter(states, (tokens + 1) % V)[0], logits[0])
    # Slots do not see later slots: what is predicted next does not depend on how far is looked ahead.
    with torch.no_grad():
        adapter.slots.weight[3:, 0] += 1  # not all of a row: LayerNorm takes a constant away
    torch.testing.assert_close(adapter(states, tokens)[:, :3], logits[:, :3])
    assert not torch.allclose(adapter(states, tokens)[:, 3:], logits[:, 3:])


def test_compression_drafter_ignores_padded_states() -> None:
    adapter = build("compression", seed=8)
    states, tokens = SAMPLES["compression"].inputs()
    mask = torch.ones(B, 9, dtype=torch.bool)
    mask[:, 5:] = False
    torch.testing.assert_close(adapter(states, tokens, mask), adapter(states[:, :5], tokens))
    assert not torch.allclose(adapter(states, tokens), adapter(states[:, :5], tokens))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LinearAdapter(0), "in_features must be a whole number of at least 1, got 0"),
        (lambda: ResidualMLPAdapter(4), "width must be a whole number of at least 1, got 0"),
        (lambda: LightweightAdapter(LightweightAdapterConfig(dropout=1.0)), r"dropout must lie in \[0, 1\)"),
        (
            lambda: CrossAttentionAligner(CrossAttentionAlignerConfig(features=10, heads=4)),
            "heads must divide features=10, got 4",
        ),
        (lambda: TokenExpander(TokenExpanderConfig(factor=0)), "factor must be"),
        (lambda: TokenAlignmentAdapter(TokenAlignmentAdapterConfig(rank=-1)), "rank must be .* got -1"),
        (
            lambda: CompressionDrafter(CompressionDrafterConfig(width=10, heads=4)),
            "heads must divide width=10, got 4",
        ),
    ],
)
def test_impossible_sizes_are_named(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("kind", "inputs", "text"),
    [
        ("cross-attention", (torch.zeros(2, 5, D), torch.zeros(3, 6, C)), r"context must be \[2, M, C\]"),
        ("cross-attention", (torch.zeros(2, 5, D), torch.zeros(2, 6, D)), "context must be"),
        ("cross-attention", (torch.zeros(2, 4, D), torch.zeros(2, 6, C)), "x must have 5 tokens, got 4"),
        ("cross-attention", (torch.zeros(2, 5, D), torch.zeros(2, 7, C)), "context must have 6 tokens"),
        ("expander", (torch.zeros(2, 4, D),), "x must have 5 tokens, got 4"),
        ("expander", (torch.zeros(5, D),), r"x must be \[B, N, 12\], got \[5, 12\]"),
        *(
            (kind, (torch.zeros(5, 1),), r"x must be \[..., \d+\], got \[5, 1\]")
            for kind in ("linear", "residual-mlp", "lightweight")
        ),
        ("token-alignment", (torch.zeros(5, V + 1),), r"x must be \[..., 30\], got \[5, 31\]"),
        (
            "compression",
            (torch.zeros(2, 5, D), torch.zeros(2, 5, dtype=torch.long)),
            "1 to 4 in a row, got 5",
        ),
        (
            "compression",
            (torch.zeros(2, 5, D), torch.zeros(3, 1, dtype=torch.long)),
            r"tokens must be \[2, T\]",
        ),
        ("compression", (torch.zeros(2, 5, C), torch.zeros(2, 1, dtype=torch.long)), "states must be"),
    ],
)
def test_inputs_that_do_not_fit_are_named(kind: str, inputs, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build(kind)(*inputs)


def test_directories_that_hold_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such adapter directory"):
        load_adapter(tmp_path / "missing")
    with pytest.raises(ValueError, match="cannot be read"):
        load_adapter(tmp_path)
    for text, message in (
        ("[" * 200_000, "cannot be read"),
        ('{"model_type": ["x"]}', "which is no adapter"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_adapter(tmp_path)
        if message == "cannot be read":
            with pytest.raises(ValueError, match="not valid JSON"):
                read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="'llama' model, which is no adapter"):
        load_adapter(tmp_path)
    build("linear").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(ValueError, match="the adapter cannot be loaded"):
        load_adapter(tmp_path)
    build("expander").save_pretrained(tmp_path / "other")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "other/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="do not fit the adapter"):
        load_adapter(tmp_path)
