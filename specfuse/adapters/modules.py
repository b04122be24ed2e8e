"""The adapters that ``adapter_cosine`` runs fused: train these modules, then score with the op.

Adapters with a residual start as the identity: the last projection is zero, so an untrained adapter passes
the drafter's features on, and training can only move away from that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specfuse.adapters.base import AdapterModel, check_width, identity, zero
from specfuse.adapters.configuration import (
    LightweightAdapterConfig,
    LinearAdapterConfig,
    ResidualMLPAdapterConfig,
)
from specfuse.kernels.adapter_cosine_ref import LAYER_NORM_EPS
from specfuse.ops.adapter_cosine import LightweightWeights, LinearWeights, ResidualMLPWeights


class LinearAdapter(AdapterModel):
    """``y = W x + b`` from I to D features; the identity at first where both are equal.

    Args:
        config: a :class:`LinearAdapterConfig`, or the width I of the drafter's features.
        features: width D of the target's; None means the same. Not beside a config.

    Raises:
        ValueError: a size below 1.

    Source: linear alignment of embedding spaces, Mikolov et al., "Exploiting Similarities among Languages for
    Machine Translation", 2013, section 4.
    """

    config_class = LinearAdapterConfig

    def __init__(
        self,
        config: LinearAdapterConfig | int,
        features: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(config, int):
            config = LinearAdapterConfig(in_features=config, features=features)
        super().__init__(config, in_features=config.in_features, features=config.features)
        width = config.features or config.in_features
        self.linear = nn.Linear(config.in_features, width, device=device, dtype=dtype)
        self.post_init()

    def _start(self, module: nn.Module) -> None:
        if module is self.linear and self.linear.in_features == self.linear.out_features:
            identity(self.linear)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., I] -> [..., D]``."""
        check_width("x", x, self.config.in_features)
        return self.linear(x)

    def weights(self) -> LinearWeights:
        """The parameters in the order of the fused op."""
        return LinearWeights(self.linear.weight, self.linear.bias)


class ResidualMLPAdapter(AdapterModel):
    """``y = x + W2 gelu(W1 x + b1) + b2``, exact GELU.

    Args:
        config: a :class:`ResidualMLPAdapterConfig`, or the width D of the features.
        width: hidden width R; needed unless there is a config.

    Raises:
        ValueError: a size below 1.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, section 2.1.
    """

    config_class = ResidualMLPAdapterConfig

    def __init__(
        self,
        config: ResidualMLPAdapterConfig | int,
        width: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(config, int):
            config = ResidualMLPAdapterConfig(features=config, width=width or 0)
        super().__init__(config, features=config.features, width=config.width)
        made: Any = {"device": device, "dtype": dtype}
        self.down = nn.Linear(config.features, config.width, **made)
        self.up = nn.Linear(config.width, config.features, **made)
        self.post_init()

    def _start(self, module: nn.Module) -> None:
        if module is self.up:
            zero(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        check_width("x", x, self.config.features)
        return x + self.up(F.gelu(self.down(x)))

    def weights(self) -> ResidualMLPWeights:
        """The parameters in the order of the fused op."""
        return ResidualMLPWeights(self.down.weight, self.down.bias, self.up.weight, self.up.bias)


class LightweightAdapter(AdapterModel):
    """A bottleneck with two LayerNorms, ``N1`` and ``N2`` with eps 1e-5::

        h = dropout(relu(N1(A x + a)))          [..., R]
        g = relu(N2(B h + b))                   [..., R]
        y = x + C g + c                         [..., D]

    Args:
        config: a :class:`LightweightAdapterConfig`, or the width D of the features.
        width: width R of the bottleneck. Not beside a config, which has 512 unless told otherwise.
        dropout: while training. Not beside a config, which has 0.1 unless told otherwise.

    Raises:
        ValueError: a size below 1, a dropout outside [0, 1).

    Source: the lightweight adapter of the published alignment of EventGPT with Video-LLaVA
    (github.com/xifan-zhang/EventGPT, feasible/feature_alignment/light_adapter.md); bottleneck adapters,
    Houlsby et al., ICML 2019, section 2.1.
    """

    config_class = LightweightAdapterConfig

    def __init__(
        self,
        config: LightweightAdapterConfig | int,
        width: int = 256,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(config, int):
            config = LightweightAdapterConfig(features=config, width=width, dropout=dropout)
        if not 0 <= config.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {config.dropout}")
        super().__init__(config, features=config.features, width=config.width)
        D, R = config.features, config.width
        made: Any = {"device": device, "dtype": dtype}
        self.down = nn.Linear(D, R, **made)
        self.norm1 = nn.LayerNorm(R, LAYER_NORM_EPS, **made)
        self.middle = nn.Linear(R, R, **made)
        self.norm2 = nn.LayerNorm(R, LAYER_NORM_EPS, **made)
        self.up = nn.Linear(R, D, **made)
        self.post_init()

    def _start(self, module: nn.Module) -> None:
        if module is self.up:
            zero(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        check_width("x", x, self.config.features)
        h = F.dropout(F.relu(self.norm1(self.down(x))), self.config.dropout, self.training)
        h = F.relu(self.norm2(self.middle(h)))
        return x + self.up(h)

    def weights(self) -> LightweightWeights:
        """The parameters in the order of the fused op."""
        layers = (self.down, self.norm1, self.middle, self.norm2, self.up)
        return LightweightWeights(*(t for layer in layers for t in (layer.weight, layer.bias)))
