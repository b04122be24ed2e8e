"""Adapters that end in tokens: the drafter's logits corrected, and sixteen tokens from compressed states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specfuse.adapters.base import AdapterModel, check_width, zero
from specfuse.adapters.configuration import CompressionDrafterConfig, TokenAlignmentAdapterConfig


class TokenAlignmentAdapter(AdapterModel):
    """Corrects the drafter's logits by the identity and a map of low rank::

        y = x + U A (x - mean(x)) + b          A [R, V], U [V, R]

    The V x V matrix ``I + U A`` never exists: for V = 32,000 and R = 64 it is 4 M numbers instead of 1,024 M.
    Without the mean, a constant that is added to all logits would change the result. U and b are zero at
    first.

    Args:
        config: V and R.

    Raises:
        ValueError: a size below 1.

    Source: low-rank updates, Hu et al., "LoRA", 2021, section 4.1; trained for acceptance with the divergence
    of Zhou et al., "DistillSpec", 2023, section 3.
    """

    config_class = TokenAlignmentAdapterConfig

    def __init__(self, config: TokenAlignmentAdapterConfig):
        super().__init__(config, vocab_size=config.vocab_size, rank=config.rank)
        self.down = nn.Linear(config.vocab_size, config.rank, bias=False)
        self.up = nn.Linear(config.rank, config.vocab_size)
        self.post_init()

    def _start(self, module: nn.Module) -> None:
        if module is self.up:
            zero(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[..., V] -> [..., V]``; raises ``ValueError`` for another width."""
        check_width("x", x, self.config.vocab_size)
        return x + self.up(self.down(x - x.mean(-1, keepdim=True)))


class CompressionDrafter(AdapterModel):
    """A small decoder that predicts the next K (16) tokens at once from compressed states.

    T tokens of the text so far and K learned slots go through a decoder of L layers, each with causal
    attention among them, attention to the M states, and an MLP; slot k holds the k-th next token::

        z = [E t_1 .. E t_T, s_1 .. s_K] + positions        [T + K, W]
        z = layer_l(z, memory = P states)                   l = 1 .. L
        logits[k] = H norm(z[T + k])                        [K, V]

    Args:
        config: of EventGPT's 582 states of 4,096 features, V = 32,000, K = 16, unless told otherwise.

    Raises:
        ValueError: a size below 1, or heads that do not divide the width.

    Source: blockwise parallel decoding, Stern et al., 2018, sections 3 and 4; learned slots that read a
    memory, Carion et al., "DETR", 2020, section 3.2.
    """

    config_class = CompressionDrafterConfig
    main_input_name = "states"

    def __init__(self, config: CompressionDrafterConfig):
        names = ("features", "vocab_size", "width", "layers", "heads", "horizon", "context")
        super().__init__(config, **{name: getattr(config, name) for name in names})
        W = config.width
        if W % config.heads:
            raise ValueError(f"heads must divide width={W}, got {config.heads}")
        self.memory = nn.Linear(config.features, W)
        self.embedding = nn.Embedding(config.vocab_size, W)
        self.slots = nn.Embedding(config.horizon, W)
        self.positions = nn.Embedding(config.context + config.horizon, W)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(W, config.heads, 4 * W, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(W)
        self.head = nn.Linear(W, config.vocab_size, bias=False)
        self.post_init()

    def _start(self, module: nn.Module) -> None:
        # Embeddings of unit size would drown what the layers add.
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.width**-0.5)

    def forward(self, states: Tensor, tokens: Tensor, states_mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, K, V]`` of the tokens that follow.

        Args:
            states: ``[B, M, D]``.
            tokens: ``[B, T]`` int64, the last T tokens of the text, T from 1 to ``config.context``.
            states_mask: ``[B, M]`` bool, False where a state is padding.

        Raises:
            ValueError: naming the argument, for a wrong shape.
        """
        check_width("states", states, self.config.features)
        if states.dim() != 3:
            raise ValueError(f"states must be [B, M, {self.config.features}], got {list(states.shape)}")
        if tokens.dim() != 2 or len(tokens) != len(states):
            raise ValueError(f"tokens must be [{len(states)}, T], got {list(tokens.shape)}")
        if not 1 <= tokens.shape[1] <= self.config.context:
            raise ValueError(f"tokens must be 1 to {self.config.context} in a row, got {tokens.shape[1]}")
        known = tokens.shape[1]
        slots = self.slots.weight.expand(len(states), -1, -1)
        # The last token of the text always stands at the same position.
        z = (
            torch.cat([self.embedding(tokens), slots], 1)
            + self.positions.weight[self.config.context - known :]
        )
        later = torch.ones(z.shape[1], z.shape[1], dtype=torch.bool, device=z.device).triu(1)
        unseen = None if states_mask is None else ~states_mask
        memory = self.memory(states)
        for layer in self.layers:
            z = layer(z, memory, tgt_mask=later, memory_key_padding_mask=unseen)
        return self.head(self.norm(z[:, known:]))

    @torch.no_grad()
    def draft(self, states: Tensor, tokens: Tensor, states_mask: Tensor | None = None) -> Tensor:
        """The most likely next K tokens ``[B, K]``; arguments and errors as of ``forward``."""
        return self(states, tokens, states_mask).argmax(-1)
