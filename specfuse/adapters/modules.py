"""The three adapters as ordinary modules: train these; ``adapter_cosine`` runs the trained ones fused.

Adapters with a residual start as the identity: the last projection is zero, so an untrained adapter passes
the drafter's features on, and training can only move away from that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specfuse.kernels.adapter_cosine_ref import LAYER_NORM_EPS
from specfuse.ops.adapter_cosine import LightweightWeights, LinearWeights, ResidualMLPWeights


class LinearAdapter(nn.Module):
    """``x W^T + b`` from ``in_features`` to ``features``; the identity at first where both are equal.

    Args:
        in_features: width of the drafter's features.
        features: width of the target's; None means the same.
    """

    def __init__(
        self,
        in_features: int,
        features: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, features or in_features, device=device, dtype=dtype)
        if features in (None, in_features):
            nn.init.eye_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., features]``."""
        return self.linear(x)

    def weights(self) -> LinearWeights:
        """The parameters in the order of the fused op."""
        return LinearWeights(self.linear.weight, self.linear.bias)


class ResidualMLPAdapter(nn.Module):
    """``x + W2 gelu(W1 x + b1) + b2``, exact GELU.

    Args:
        features: width D of the features.
        width: hidden width R.
    """

    def __init__(
        self,
        features: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(features, width, device=device, dtype=dtype)
        self.up = _zero(nn.Linear(width, features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        return x + self.up(F.gelu(self.down(x)))

    def weights(self) -> ResidualMLPWeights:
        """The parameters in the order of the fused op."""
        return ResidualMLPWeights(self.down.weight, self.down.bias, self.up.weight, self.up.bias)


class LightweightAdapter(nn.Module):
    """A bottleneck with two LayerNorms: Linear D->R, norm, ReLU, Linear R->R, norm, ReLU, Linear R->D, + x.

    Args:
        features: width D of the features.
        width: width R of the bottleneck.
    """

    def __init__(
        self,
        features: int,
        width: int = 256,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(features, width, device=device, dtype=dtype)
        self.norm1 = nn.LayerNorm(width, LAYER_NORM_EPS, device=device, dtype=dtype)
        self.middle = nn.Linear(width, width, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(width, LAYER_NORM_EPS, device=device, dtype=dtype)
        self.up = _zero(nn.Linear(width, features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        h = F.relu(self.norm1(self.down(x)))
        h = F.relu(self.norm2(self.middle(h)))
        return x + self.up(h)

    def weights(self) -> LightweightWeights:
        """The parameters in the order of the fused op."""
        layers = (self.down, self.norm1, self.middle, self.norm2, self.up)
        return LightweightWeights(*(t for layer in layers for t in (layer.weight, layer.bias)))


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
