"""Inputs of adapter_cosine and its comparison with float64, shared by all tests of the op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from specfuse.kernels.adapter_cosine_ref import adapter_cosine_ref, align_ref

KINDS = ("linear", "residual_mlp", "lightweight")
EPS = 1e-8


def weights_of(kind: str, D: int, R: int, I: int | None = None, seed: int = 0) -> list[Tensor]:  # noqa: E741
    """Random float32 weights whose every part changes the output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (
            torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
            if len(shape) > 1
            else vector(shape[0])
        )

    def vector(n: int) -> Tensor:
        return 0.5 * torch.randn(n, generator=generator)

    if kind == "linear":
        return [normal(D, I or D), vector(D)]
    if kind == "residual_mlp":
        return [normal(R, D), vector(R), 2 * normal(D, R), vector(D)]
    first, second = (1 + vector(R), vector(R)), (1 + vector(R), vector(R))
    # A mean far from zero: variances taken as E[z^2] - E[z]^2 would lose their digits.
    down_bias = vector(R) + 20.0
    return [normal(R, D), down_bias, *first, normal(R, R), vector(R), *second, 2 * normal(D, R), vector(D)]


def inputs(
    kind: str, M: int, D: int, R: int, dtype: torch.dtype, device: str = "cpu", seed: int = 1
) -> tuple[Tensor, list[Tensor], Tensor]:
    """x, weights and targets that lie between the adapter's output and noise, so that scores spread."""
    generator = torch.Generator().manual_seed(seed)
    weights = [w.to(dtype).to(device) for w in weights_of(kind, D, R)]
    x = torch.randn(M, D, generator=generator).to(dtype).to(device)
    noise = torch.randn(M, D, generator=generator).to(device)
    share = torch.linspace(-1.0, 1.0, M)[:, None].to(device)
    target = share * align_ref(x.float(), [w.float() for w in weights]) + (1 - share.abs()) * noise
    return x, weights, target.to(dtype)


def assert_as_good_as_eager(
    result: tuple[Tensor, Tensor, Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor],
    target: Tensor,
    threshold: float,
) -> None:
    """Score and features are at most twice as far from float64 as same-dtype eager; decisions follow."""
    score, accept, aligned = result
    truth, _, y = adapter_cosine_ref(
        x.double(), [w.double() for w in weights], target.double(), threshold, EPS
    )
    eager = align_ref(x, weights)
    eager_score = F.cosine_similarity(eager, target, eps=EPS)
    assert score.dtype == torch.float32 and score.shape == truth.shape
    compare("score", score, eager_score, truth, 1e-6)
    if aligned is not None:
        assert aligned.dtype == x.dtype
        compare("aligned", aligned, eager, y, 2.0 * torch.finfo(x.dtype).eps)
    assert accept.dtype == torch.bool and torch.equal(accept, score >= threshold)


def compare(name: str, actual: Tensor, eager: Tensor, truth: Tensor, floor: float) -> None:
    error = (actual.double() - truth).abs()
    allowed = 2.0 * (eager.double() - truth).abs().max() + floor
    assert error.isfinite().all(), f"{name} holds values that are not finite"
    worst = int(error.argmax()) if error.numel() else 0
    assert not error.numel() or error.max() <= allowed, (
        f"{name}: error {error.max():.3e} at {worst}, allowed {allowed:.3e}"
    )
