"""Definition of adapter + cosine: what each adapter computes, and how its output scores against a target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-5
KINDS = {2: "linear", 4: "residual_mlp", 10: "lightweight"}  # by the number of weights


def align_ref(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``[M, D]``: the adapter's output; which adapter is told by how many weights it has."""
    kind = KINDS[len(weights)]
    if kind == "linear":
        weight, bias = weights
        return F.linear(x, weight, bias)
    if kind == "residual_mlp":
        w1, b1, w2, b2 = weights
        return x + F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
    down, down_bias, gain1, shift1, middle, middle_bias, gain2, shift2, up, up_bias = weights
    h = F.linear(x, down, down_bias)
    h = F.relu(F.layer_norm(h, (h.shape[-1],), gain1, shift1, LAYER_NORM_EPS))
    h = F.linear(h, middle, middle_bias)
    h = F.relu(F.layer_norm(h, (h.shape[-1],), gain2, shift2, LAYER_NORM_EPS))
    return x + F.linear(h, up, up_bias)


def adapter_cosine_ref(
    x: Tensor, weights: Sequence[Tensor], target: Tensor, threshold: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(score, accept, aligned)`` in float32 or wider: ``dot(y, t) / (max(|y|, eps) * max(|t|, eps))``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = align_ref(x.to(dtype), [w.to(dtype) for w in weights])
    t = target.to(dtype)
    norms = y.norm(dim=1).clamp(min=eps) * t.norm(dim=1).clamp(min=eps)
    score = (y * t).sum(dim=1) / norms
    return score, score >= threshold, y
