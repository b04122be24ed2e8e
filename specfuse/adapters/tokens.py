"""Adapters that read or write several tokens at once: alignment by attention, and expansion."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from specfuse.adapters.base import AdapterModel, check_width, identity, zero
from specfuse.adapters.configuration import CrossAttentionAlignerConfig, TokenExpanderConfig
from specfuse.kernels.adapter_cosine_ref import LAYER_NORM_EPS


class CrossAttentionAligner(AdapterModel):
    """The drafter's tokens look at tokens of the target's encoder, h heads of D / h features::

        q = Q (N(x) + s)   k = K (M(c) + t)   v = V M(c)        N, M: LayerNorms
        y = P x + e + O concat_i softmax(q_i k_i^T / sqrt(D / h)) v_i

    s, t and e, one vector for each place, are there where the config counts places: with them a token finds
    what stands at its own place of the context. P is the identity, O and e are zero at first, so an untrained
    aligner changes nothing.

    Args:
        config: 4,096 features for queries, 1,024 for keys and values, 32 heads unless told otherwise.

    Raises:
        ValueError: a size below 1, or heads that do not divide the features.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2; as a bridge between encoders,
    Alayrac et al., "Flamingo", 2022, section 3.1 (there with a tanh gate that starts at zero); learned
    places, Carion et al., "DETR", 2020, section 3.2.
    """

    config_class = CrossAttentionAlignerConfig

    def __init__(self, config: CrossAttentionAlignerConfig):
        names = ("features", "context_features", "heads", "places", "context_places")
        super().__init__(config, **{name: getattr(config, name) for name in names})
        D, C = config.features, config.context_features
        if D % config.heads:
            raise ValueError(f"heads must divide features={D}, got {config.heads}")
        self.norm = nn.LayerNorm(D, LAYER_NORM_EPS)
        self.context_norm = nn.LayerNorm(C, LAYER_NORM_EPS)
        self.query = nn.Linear(D, D)
        self.key = nn.Linear(C, D)
        self.value = nn.Linear(C, D)
        self.out = nn.Linear(D, D)
        self.project = nn.Linear(D, D)
        self.query_places = _places(config.places, D)
        self.out_places = _places(config.places, D)
        self.key_places = _places(config.context_places, C)
        self.post_init()

    def _start(self, module: nn.Module) -> None:
        if module is self.out or module is self.out_places:
            zero(module)
        elif module is self.project:
            identity(self.project)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """``x [B, N, D]``, ``context [B, M, C]`` to ``[B, N, D]``.

        Args:
            x: the drafter's tokens.
            context: the target's tokens.
            context_mask: ``[B, M]`` bool, False where a token is padding; every row has one that is not.

        Raises:
            ValueError: a wrong width or batch size, or another number of tokens than there are places.
        """
        check_width("x", x, self.config.features)
        check_width("context", context, self.config.context_features)
        if x.dim() != 3 or context.dim() != 3 or len(x) != len(context):
            raise ValueError(
                f"context must be [{len(x)}, M, C] for x {list(x.shape)}, got {list(context.shape)}"
            )
        c = self.context_norm(context)
        parts = (
            self.query(_at_places("x", self.norm(x), self.query_places)),
            self.key(_at_places("context", c, self.key_places)),
            self.value(c),
        )
        q, k, v = (part.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for part in parts)
        mask = None if context_mask is None else context_mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = self.project(x) + self.out(attended.transpose(1, 2).flatten(2))
        return _at_places("x", y, self.out_places)


class TokenExpander(AdapterModel):
    """One token becomes F (4): what a drafter with few visual tokens lacks beside its target::

        y[F i + k] = P x[i] + (W2 gelu(W1 x[i] + b1 + p[i]) + b2)[k D : (k + 1) D]        k = 0 .. F - 1

    p, one vector for each place, is there where the config counts places. P is the identity at first where
    I = D; W2, b2 and p are zero: F copies of P x.

    Args:
        config: I, D, R, F and the number of places.

    Raises:
        ValueError: a size below 1.

    Source: the inverse of merging 2 x 2 patches into one, Liu et al., "Swin Transformer", 2021, section 3.1;
    as learned upsampling, Shi et al., "Real-Time Single Image and Video Super-Resolution", 2016, section 3.2.
    """

    config_class = TokenExpanderConfig

    def __init__(self, config: TokenExpanderConfig):
        names = ("in_features", "features", "width", "factor", "places")
        super().__init__(config, **{name: getattr(config, name) for name in names})
        width = config.features or config.in_features
        self.project = nn.Linear(config.in_features, width)
        self.down = nn.Linear(config.in_features, config.width)
        self.up = nn.Linear(config.width, config.factor * width)
        self.places = _places(config.places, config.width)
        self.post_init()

    def _start(self, module: nn.Module) -> None:
        if module is self.up or module is self.places:
            zero(module)
        elif module is self.project and self.project.in_features == self.project.out_features:
            identity(self.project)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, I]`` to ``[B, N F, D]``; the F tokens of one stand in a row.

        Raises:
            ValueError: a wrong width, number of dimensions or number of places.
        """
        check_width("x", x, self.config.in_features)
        if x.dim() != 3:
            raise ValueError(f"x must be [B, N, {self.config.in_features}], got {list(x.shape)}")
        hidden = F.gelu(_at_places("x", self.down(x), self.places))
        added = self.up(hidden).unflatten(-1, (self.config.factor, -1))
        return (self.project(x)[:, :, None] + added).flatten(1, 2)


def _places(count: int | None, width: int) -> nn.Embedding | None:
    return None if count is None else nn.Embedding(count, width)


def _at_places(name: str, tokens: Tensor, places: nn.Embedding | None) -> Tensor:
    if places is None:
        return tokens
    if tokens.shape[1] != places.num_embeddings:
        raise ValueError(f"{name} must have {places.num_embeddings} tokens, got {tokens.shape[1]}")
    return tokens + places.weight
