"""Contract of ``adapter_cosine``: how close an adapter brings drafter features to the target's."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specfuse.kernels.adapter_cosine_ref import adapter_cosine_ref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

torch.library.define(
    "specfuse::adapter_cosine",
    "(Tensor x, Tensor[] weights, Tensor target, float threshold, float eps, bool return_aligned)"
    " -> (Tensor, Tensor, Tensor)",
)
_op = torch.ops.specfuse.adapter_cosine.default


class LinearWeights(NamedTuple):
    """``x W^T + b``; the only adapter whose input may have another width, I."""

    weight: Tensor  # [D, I]
    bias: Tensor  # [D]


class ResidualMLPWeights(NamedTuple):
    """``x + W2 gelu(W1 x + b1) + b2`` with the exact (erf) GELU."""

    w1: Tensor  # [R, D]
    b1: Tensor  # [R]
    w2: Tensor  # [D, R]
    b2: Tensor  # [D]


class LightweightWeights(NamedTuple):
    """``x + up(relu(norm2(middle(relu(norm1(down(x)))))))``, LayerNorms with eps 1e-5."""

    down: Tensor  # [R, D]
    down_bias: Tensor  # [R]
    gain1: Tensor  # [R]
    shift1: Tensor  # [R]
    middle: Tensor  # [R, R]
    middle_bias: Tensor  # [R]
    gain2: Tensor  # [R]
    shift2: Tensor  # [R]
    up: Tensor  # [D, R]
    up_bias: Tensor  # [D]


AdapterWeights = LinearWeights | ResidualMLPWeights | LightweightWeights


class Adapter(Protocol):
    """A module that can be run fused, as those of ``specfuse.adapters``."""

    def weights(self) -> AdapterWeights: ...


class AlignedScore(NamedTuple):
    """How well each adapted row fits its target."""

    score: Tensor  # [M] float32 cosine similarity; NaN where a row holds NaN
    accept: Tensor  # [M] bool, score >= threshold; False for NaN
    aligned: Tensor | None  # [M, D] the adapter's output in x's dtype, on request


_SHAPES: dict[int, tuple[type[AdapterWeights], tuple[str, ...]]] = {
    2: (LinearWeights, ("DI", "D")),
    4: (ResidualMLPWeights, ("RD", "R", "DR", "D")),
    10: (LightweightWeights, ("RD", "R", "R", "R", "RR", "R", "R", "R", "DR", "D")),
}


def _check(x: Tensor, weights: Sequence[Tensor], target: Tensor, threshold: float, eps: float) -> None:
    if len(weights) not in _SHAPES:
        raise ValueError(f"weights must be 2, 4 or 10 tensors, got {len(weights)}")
    if target.dim() != 2 or target.dtype not in DTYPES or target.shape[1] < 1:
        raise ValueError(f"target must be [M, D] float32, float16 or bfloat16, got {_describe(target)}")
    (M, D), (kind, shapes) = target.shape, _SHAPES[len(weights)]
    width = x.shape[1] if kind is LinearWeights and x.dim() == 2 else D
    sizes = {"D": D, "I": width, "R": max(1, weights[0].shape[0]) if weights[0].dim() else 1}
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [("x", x, (M, max(1, width)))]
    for name, t, letters in zip(kind._fields, weights, shapes, strict=True):
        expected.append((f"weights.{name}", t, tuple(sizes[letter] for letter in letters)))
    for name, t, shape in expected:
        if t.shape != shape or t.dtype != target.dtype or t.device != target.device:
            wanted = f"{list(shape)} {target.dtype} on {target.device}"
            raise ValueError(f"{name} must be {wanted}, got {_describe(t)}")
    if not -1.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must lie in [-1, 1], got {threshold}")
    if not eps > 0.0:
        raise ValueError(f"eps must be positive, got {eps}")


def _describe(t: Tensor) -> str:
    return f"{list(t.shape)} {t.dtype} on {t.device}"


@torch.library.register_fake("specfuse::adapter_cosine")
def _fake(
    x: Tensor, weights: Sequence[Tensor], target: Tensor, threshold: float, eps: float, return_aligned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weights, target, threshold, eps)
    M, D = target.shape
    score = target.new_empty((M,), dtype=torch.float32)
    return score, score.new_empty((M,), dtype=torch.bool), target.new_empty((M if return_aligned else 0, D))


def _reference(
    x: Tensor, weights: Sequence[Tensor], target: Tensor, threshold: float, eps: float, return_aligned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weights, target, threshold, eps)
    score, accept, aligned = adapter_cosine_ref(x, weights, target, threshold, eps)
    return score, accept, aligned.to(x.dtype) if return_aligned else target.new_empty((0, target.shape[1]))


torch.library.impl("specfuse::adapter_cosine", "default", _reference)

if importlib.util.find_spec("triton") is not None:

    @torch.library.impl("specfuse::adapter_cosine", "cuda")
    def _cuda(
        x: Tensor,
        weights: Sequence[Tensor],
        target: Tensor,
        threshold: float,
        eps: float,
        return_aligned: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Imported here: triton is slow to import, and a CPU has no use for it.
        from specfuse.kernels.adapter_cosine import adapter_cosine_triton

        _check(x, weights, target, threshold, eps)
        with torch.cuda.device(x.device):
            return adapter_cosine_triton(x, weights, target, threshold, eps, return_aligned)


NO_GRADIENT = (
    "adapter_cosine has no backward pass: train with the eager module (specfuse.adapters.LinearAdapter, "
    "ResidualMLPAdapter or LightweightAdapter) and torch.nn.functional.cosine_similarity, and call this "
    "under torch.no_grad() or torch.inference_mode()"
)


def _refuse_autograd(ctx: object, inputs: object, output: object) -> None:
    raise RuntimeError(NO_GRADIENT)


torch.library.register_autograd(
    "specfuse::adapter_cosine", lambda ctx, *grads: None, setup_context=_refuse_autograd
)


def adapter_cosine(
    x: Tensor,
    adapter: Adapter | AdapterWeights,
    target: Tensor,
    threshold: float,
    *,
    return_aligned: bool = False,
    eps: float = 1e-8,
) -> AlignedScore:
    """Adapts features and scores them against a target without storing the adapted ``[M, D]``.

    Equivalent to, with ``y = adapter(x)`` and everything accumulated in float32::

        score = torch.nn.functional.cosine_similarity(y, target, eps=1e-8)
        accept = score >= threshold

    **Accepting drafts by this score is lossy**: a high cosine does not mean that the target would have said
    the same token (measured on real states: 54 % match at a score above 0.8, 88 % above 0.95). It is never a
    default. Choose the threshold by calibration: measure P(token match | score) on held-out data of your own.

    Args:
        x: ``[M, D]`` features of the drafter (``[M, I]`` for a linear adapter), float32, float16 or bfloat16.
            Rows may be slices of a larger tensor.
        adapter: a module of :mod:`specfuse.adapters`, or its weights as LinearWeights, ResidualMLPWeights or
            LightweightWeights; dtype and device of ``x``.
        target: ``[M, D]`` features of the target model, dtype and device of ``x``.
        threshold: smallest score that is accepted, in [-1, 1].
        return_aligned: also return the adapter's output ``[M, D]``.
        eps: lower bound of either norm: a zero row scores 0.

    Raises:
        ValueError: naming the argument, for a wrong shape, dtype, device or value.
        RuntimeError: under autograd, when an argument or a weight requires a gradient.

    Source: bottleneck adapters, Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019,
    section 2; split-K with a fixed order of summation instead of atomics.
    """
    if not isinstance(adapter, LinearWeights | ResidualMLPWeights | LightweightWeights):
        if not hasattr(adapter, "weights"):
            raise ValueError(
                "adapter must be a module of specfuse.adapters that maps vectors (linear, residual-mlp, "
                f"lightweight) or its weights, got {type(adapter).__name__}"
            )
        adapter = adapter.weights()
    score, accept, aligned = _op(x, list(adapter), target, threshold, eps, return_aligned)
    return AlignedScore(score, accept, aligned if return_aligned else None)
