"""Adapters: samples a second of every kind, eager and, where the op knows the kind, fused with its score.

The figure to reach on a GPU is the 48,249 samples/s that the published study reports for its lightweight
adapter on 150,528 features (github.com/xifan-zhang/EventGPT, light_adapter.md; GPU and batch not named).
A sample is one vector, or all tokens of one clip. "eager" calls the module; "specfuse" is adapter_cosine,
which also compares with the target and stores nothing of the output; "materialised" multiplies the logits by
the whole V x V matrix. bfloat16 on CUDA, float32 on a CPU. Bytes: weights, inputs and outputs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Case, main, parametrize, run_case
from torch import Tensor, nn

from specfuse.adapters import (
    KINDS,
    AdapterModel,
    CompressionDrafterConfig,
    CrossAttentionAlignerConfig,
    LightweightAdapterConfig,
    LinearAdapterConfig,
    ResidualMLPAdapterConfig,
    TokenAlignmentAdapterConfig,
    TokenExpanderConfig,
)
from specfuse.ops.adapter_cosine import adapter_cosine

EVENT_TOKENS, FRAME_TOKENS = 582, 257  # of EventGPT and of one frame of Video-LLaVA
# kind, config, samples of a call, shape of one sample, whether a CPU gets it too
SIZES: list[tuple[str, Any, int, tuple[int, ...], bool]] = [
    ("lightweight", LightweightAdapterConfig(features=150_528), 8, (150_528,), True),
    ("lightweight", LightweightAdapterConfig(features=150_528), 1024, (150_528,), False),
    ("lightweight", LightweightAdapterConfig(features=1024), 1024, (1024,), True),
    ("lightweight", LightweightAdapterConfig(features=4096), 4096, (4096,), False),
    ("residual-mlp", ResidualMLPAdapterConfig(features=1024), 1024, (1024,), True),
    ("linear", LinearAdapterConfig(in_features=1024, features=4096), 1024, (1024,), True),
    ("cross-attention", CrossAttentionAlignerConfig(), 1, (EVENT_TOKENS, 4096), False),
    ("cross-attention", CrossAttentionAlignerConfig(features=1024), 1, (EVENT_TOKENS, 1024), True),
    ("expander", TokenExpanderConfig(in_features=1024), 1, (144, 1024), True),
    ("token-alignment", TokenAlignmentAdapterConfig(), 16, (32_000,), True),
    ("token-alignment", TokenAlignmentAdapterConfig(vocab_size=4_000), 16, (4_000,), True),
    ("compression", CompressionDrafterConfig(), 1, (EVENT_TOKENS, 4096), True),
]


class Problem:
    """An adapter with random weights and inputs of one size."""

    def __init__(self, kind: str, config: Any, samples: int, shape: tuple[int, ...], device: str) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device(device):
            self.adapter: AdapterModel = KINDS[kind](config).to(dtype).eval().requires_grad_(False)
            self.inputs = [torch.randn(samples, *shape, dtype=dtype)]
            if kind == "cross-attention":
                self.inputs.append(torch.randn(samples, FRAME_TOKENS, config.context_features, dtype=dtype))
            if kind == "compression":
                self.inputs.append(torch.randint(0, config.vocab_size, (samples, config.context)))
        for parameter in self.adapter.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        self.samples, self.vectors = samples, samples * (shape[0] if len(shape) > 1 else 1)
        out = self.eager()
        self.target = torch.randn_like(out)
        weights = list(self.adapter.parameters())
        self.bytes = sum(t.numel() * t.element_size() for t in (*weights, *self.inputs, out))
        # Products of the weights with every vector; attention between tokens is small beside them.
        self.flops = 2 * self.vectors * sum(p.numel() for p in weights if p.dim() == 2)

    def eager(self) -> Tensor:
        return self.adapter(*self.inputs)

    def fused(self) -> Tensor:
        return adapter_cosine(self.inputs[0], self.adapter, self.target, 0.8).score  # type: ignore[arg-type]

    def providers(self, kind: str) -> dict[str, Callable[[], Tensor]]:
        """Who runs it: the module, the fused op where it knows the kind, the whole matrix where it fits."""
        found = {"eager": self.eager}
        if kind in ("linear", "residual-mlp", "lightweight"):
            found["specfuse"] = self.fused
        vocabulary = self.inputs[0].shape[-1]
        if kind == "token-alignment" and vocabulary <= 4_000:
            zeros = torch.zeros_like(self.inputs[0][:1])
            matrix = (self.adapter(torch.eye(vocabulary).to(zeros)) - self.adapter(zeros)).contiguous()
            bias = self.adapter(zeros)
            found["materialised"] = lambda: self.inputs[0] @ matrix + bias
        return found

    def check(self, kind: str) -> None:
        """The fused score is eager's cosine, the whole matrix gives eager's logits."""
        found, out = self.providers(kind), self.eager()
        assert bool(out.isfinite().all()), "eager gives numbers that are not finite"
        loose = 2e-2 if out.dtype == torch.bfloat16 else 1e-3
        if "specfuse" in found:
            expected = torch.nn.functional.cosine_similarity(out.float(), self.target.float())
            torch.testing.assert_close(self.fused(), expected, atol=loose, rtol=0)
        if "materialised" in found:
            torch.testing.assert_close(found["materialised"](), out, atol=10 * loose, rtol=loose)


def cases(device: str) -> Iterator[Case]:
    for kind, config, samples, shape, small in SIZES:
        if device == "cpu" and not small:
            continue
        problem = Problem(kind, config, samples, shape, device)
        yield Case(
            name=f"{kind}-M{samples}-" + "x".join(map(str, shape)) + f"-{str(problem.inputs[0].dtype)[6:]}",
            providers=dict(problem.providers(kind)),
            check=lambda problem=problem, kind=kind: problem.check(kind),  # type: ignore[misc]
            bytes=problem.bytes,
            flops=problem.flops,
            small=small,
            compile=problem.eager,
            samples=samples,
        )


def pytest_generate_tests(metafunc: Any) -> None:
    parametrize(metafunc, cases)


def test_bench_adapters(benchmark: Any, case: Any, provider: str) -> None:
    run_case(benchmark, case, provider)


if __name__ == "__main__":
    main(__doc__, cases)
