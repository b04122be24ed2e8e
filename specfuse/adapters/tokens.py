"""Adapters that read or write several tokens at once: alignment by attention, and expansion."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from specfuse.adapters.base import AdapterModel, check_width, zero
from specfuse.adapters.configuration import CrossAttentionAlignerConfig, TokenExpanderConfig
from specfuse.kernels.adapter_cosine_ref import LAYER_NORM_EPS


class CrossAttentionAligner(AdapterModel):
    """The drafter's tokens look at tokens of the target's encoder, h heads of D / h features::

        q = Q N(x)   k = K M(c)   v = V M(c)        N, M: LayerNorms
        y = x + O concat_i softmax(q_i k_i^T / sqrt(D / h)) v_i

    O is zero at first, so an untrained aligner is the identity.

    Args:
        config: 4,096 features for queries, 1,024 for keys and values, 32 heads unless told otherwise.

    Raises:
        ValueError: a size below 1, or heads that do not divide the features.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2; as a bridge between encoders,
    Alayrac et al., "Flamingo", 2022, section 3.1 (there with a tanh gate that starts at zero).
    """

    config_class = CrossAttentionAlignerConfig

    def __init__(self, config: CrossAttentionAlignerConfig):
        super().__init__(
            config, features=config.features, context_features=config.context_features, heads=config.heads
        )
        D, C = config.features, config.context_features
        if D % config.heads:
            raise ValueError(f"heads must divide features={D}, got {config.heads}")
        self.norm = nn.LayerNorm(D, LAYER_NORM_EPS)
        self.context_norm = nn.LayerNorm(C, LAYER_NORM_EPS)
        self.query = nn.Linear(D, D)
        self.key = nn.Linear(C, D)
        self.value = nn.Linear(C, D)
        self.out = nn.Linear(D, D)
        self.post_init()

    def _start(self, module: nn.Module) -> None:
        if module is self.out:
            zero(self.out)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """``x [B, N, D]``, ``context [B, M, C]`` to ``[B, N, D]``.

        Args:
            x: the drafter's tokens.
            context: the target's tokens.
            context_mask: ``[B, M]`` bool, False where a token is padding; every row has one that is not.

        Raises:
            ValueError: a wrong width or batch size.
        """
        check_width("x", x, self.config.features)
        check_width("context", context, self.config.context_features)
        if x.dim() != 3 or context.dim() != 3 or len(x) != len(context):
            raise ValueError(
                f"context must be [{len(x)}, M, C] for x {list(x.shape)}, got {list(context.shape)}"
            )
        c = self.context_norm(context)
        parts = (self.query(self.norm(x)), self.key(c), self.value(c))
        q, k, v = (part.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for part in parts)
        mask = None if context_mask is None else context_mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class TokenExpander(AdapterModel):
    """One token becomes F (4): what a drafter with few visual tokens lacks beside its target::

        y[F i + k] = P x[i] + (W2 gelu(W1 x[i] + b1) + b2)[k D : (k + 1) D]        k = 0 .. F - 1

    P is the identity where I = D, else learned. W2 and b2 are zero at first: F copies of P x.

    Args:
        config: I, D, R and F.

    Raises:
        ValueError: a size below 1.

    Source: the inverse of merging 2 x 2 patches into one, Liu et al., "Swin Transformer", 2021, section 3.1;
    as learned upsampling, Shi et al., "Real-Time Single Image and Video Super-Resolution", 2016, section 3.2.
    """

    config_class = TokenExpanderConfig

    def __init__(self, config: TokenExpanderConfig):
        super().__init__(
            config,
            in_features=config.in_features,
            features=config.features,
            width=config.width,
            factor=config.factor,
        )
        width = config.features or config.in_features
        same = width == config.in_features
        self.project = nn.Identity() if same else nn.Linear(config.in_features, width)
        self.down = nn.Linear(config.in_features, config.width)
        self.up = nn.Linear(config.width, config.factor * width)
        self.post_init()

    def _start(self, module: nn.Module) -> None:
        if module is self.up:
            zero(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, I]`` to ``[B, N F, D]``; the F tokens of one stand in a row.

        Raises:
            ValueError: a wrong width or number of dimensions.
        """
        check_width("x", x, self.config.in_features)
        if x.dim() != 3:
            raise ValueError(f"x must be [B, N, {self.config.in_features}], got {list(x.shape)}")
        added = self.up(F.gelu(self.down(x))).unflatten(-1, (self.config.factor, -1))
        return (self.project(x)[:, :, None] + added).flatten(1, 2)
