"""DraftHead: one transformer layer that continues a target's hidden states, and its files."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL_TYPE = "specfuse_draft_head"
WEIGHTS = "model.safetensors"
_SIZES = ("width", "vocabulary", "heads", "inner", "event_width", "shortlist", "rope_base")


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Sizes of a head.

    Args:
        width: D, the target's hidden size.
        vocabulary: V, the target's; its embedding and its language-model head are used.
        heads: attention heads; D is divided evenly among them.
        inner: width of the gated MLP.
        event_width: D of the event features that the head starts from, 0 for none.
        shortlist: number of tokens that may be drafted, 0 for all.
        rope_base: of the rotary positions.

    Raises:
        ValueError: a size out of range, or heads that do not divide D into even parts.
    """

    width: int
    vocabulary: int
    heads: int = 4
    inner: int = 256
    event_width: int = 0
    shortlist: int = 0
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        for name in _SIZES:
            value, least = getattr(self, name), 0 if name in ("event_width", "shortlist") else 1
            kinds = int | float if name == "rope_base" else int
            if isinstance(value, bool) or not isinstance(value, kinds) or value < least:
                raise ValueError(f"{name} must be a number of at least {least}, got {value!r}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 * heads = {2 * self.heads}, got {self.width}")
        if self.shortlist > self.vocabulary:
            raise ValueError(f"shortlist must be at most {self.vocabulary} tokens, got {self.shortlist}")


class DraftHead(nn.Module):
    """Predicts the target's next hidden state from the last one and the token that was chosen after it.

    For positions i with the target's hidden states h_i (what its language-model head reads) and tokens t_i,

        x_i = W_t embedding(t_{i+1}) + W_h h_i          g_i = norm(layer(x_i; x_0 .. x_i))

    where g_i stands for h_{i+1}, so that the target's own language-model head turns it into the distribution
    of t_{i+2}. Behind a drafted token, g_i takes the place of h_{i+1}: the target does not run. Drafted
    positions look at what is committed and not at each other (what was drafted before them is in g), so that
    a level of a tree has no keys, no values and no mask of its own.

    Source: Li et al., "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty", 2024; training
    on its own predictions as in "EAGLE-3", 2025.
    """

    shortlist: Tensor | None
    """``[n]`` int64: the tokens that may be drafted, ascending; None for all."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        width, inner = config.width, config.inner

        def matrix(rows: int, columns: int = width, gain: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns) * gain * columns**-0.5)

        def norm() -> tuple[nn.Parameter, nn.Parameter]:
            return nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

        # Plain parameters: in a layer this small, calling modules takes longer than multiplying.
        self.from_token = matrix(width)
        # The hidden state passes through at first: consecutive ones have much in common.
        self.from_state = nn.Parameter(torch.eye(width))
        self.from_state_bias = nn.Parameter(torch.zeros(width))
        self.norm_attention, self.norm_attention_bias = norm()
        self.query, self.key_value = matrix(width), matrix(2 * width)
        self.out, self.out_bias = matrix(width, gain=0.1), nn.Parameter(torch.zeros(width))
        self.norm_mlp, self.norm_mlp_bias = norm()
        self.gate_up, self.down = matrix(2 * inner), matrix(width, inner, gain=0.1)
        self.down_bias = nn.Parameter(torch.zeros(width))
        self.norm_last, self.norm_last_bias = norm()
        self.events = nn.Linear(config.event_width, width) if config.event_width else None
        listed = torch.arange(config.shortlist) if config.shortlist else None
        self.register_buffer("shortlist", listed)
        self._turns: Tensor | None = None

    def token_inputs(self, embeddings: Tensor) -> Tensor:
        """``W_t embedding``, ``[..., D]`` to ``[..., D]``."""
        return F.linear(embeddings, self.from_token)

    def state_inputs(self, hidden: Tensor) -> Tensor:
        """``W_h h``, ``[..., D]`` to ``[..., D]``."""
        return F.linear(hidden, self.from_state, self.from_state_bias)

    def logits_of(self, output: Any) -> Callable[[Tensor], Tensor]:
        """What turns g into logits ``[..., n]`` of the tokens that may be drafted, by the target's head."""
        if self.shortlist is None:
            return output
        weight, bias = output.weight[self.shortlist], getattr(output, "bias", None)
        bias = None if bias is None else bias[self.shortlist]
        return functools.partial(F.linear, weight=weight, bias=bias)

    def normed(self, x: Tensor) -> Tensor:
        """X as attention reads it. A LayerNorm is one kernel on every device, an RMSNorm several on a CPU."""
        return F.layer_norm(x, x.shape[-1:], self.norm_attention, self.norm_attention_bias)

    def queries(self, normed: Tensor, turns: Tensor) -> Tensor:
        """``[B, H, q, D / H]`` of ``normed(x) [B, q, D]``; ``turns [B or 1, q or 1, D / H / 2]``.

        The rotations are the rows of :meth:`turns` at x's positions, which count from the head's own first.
        """
        return self._turned(self._split(F.linear(normed, self.query), self.config.heads), turns)

    def keys_values(self, normed: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """Two of ``[B, H, q, D / H]``, as for :meth:`queries`."""
        keys, values = self._split(F.linear(normed, self.key_value), 2 * self.config.heads).chunk(2, dim=2)
        return self._turned(keys, turns), values.transpose(1, 2)

    def _split(self, x: Tensor, parts: int) -> Tensor:
        return x.view(*x.shape[:2], parts, self.config.width // self.config.heads)

    @staticmethod
    def _turned(x: Tensor, turns: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns[:, :, None]).flatten(-2).to(x.dtype).transpose(1, 2)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Computes g ``[B, q, D]`` from x and what attention returned, ``[B, H, q, D / H]``."""
        width = x.shape[-1:]
        x = x + F.linear(attended.transpose(1, 2).flatten(2), self.out, self.out_bias)
        normed = F.layer_norm(x, width, self.norm_mlp, self.norm_mlp_bias)
        gate, up = F.linear(normed, self.gate_up).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, self.down, self.down_bias)
        return F.layer_norm(x, width, self.norm_last, self.norm_last_bias)

    def turns(self, longest: int, device: torch.device) -> Tensor:
        """Rotations of at least ``longest`` positions ``[P, D / H / 2]``, complex64, kept between calls."""
        if self._turns is None or self._turns.device != device or len(self._turns) < longest:
            size = self.config.width // self.config.heads
            powers = torch.arange(0, size, 2, device=device) / size
            places = torch.arange(max(2 * longest, 512), device=device)
            angles = places[:, None] * self.config.rope_base**-powers
            self._turns = torch.polar(torch.ones_like(angles), angles)
        return self._turns

    # ---------------------------------------------------------------- files

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``config.json`` and ``model.safetensors`` (float16); created if missing."""
        from safetensors.torch import save_file

        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        config = {"model_type": MODEL_TYPE, **asdict(self.config)}
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {
            name: (value.half() if value.is_floating_point() else value).contiguous()
            for name, value in self.state_dict().items()
        }
        save_file(weights, path / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> DraftHead:
        """Reads what :meth:`save_pretrained` wrote; float32, in eval mode, on the CPU.

        Raises:
            FileNotFoundError: no such directory, or no weights in it.
            ValueError: no head, or broken files; names the directory.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from specfuse.models.checkpoint import read_config

        config = read_config(directory)
        if config.get("model_type") != MODEL_TYPE:
            raise ValueError(f"{directory} holds a {config.get('model_type')!r} model, not a draft head")
        try:
            head = cls(HeadConfig(**{name: config[name] for name in _SIZES}))
        except KeyError as error:
            raise ValueError(f"{Path(directory) / 'config.json'} lacks {error}") from None
        except ValueError as error:
            raise ValueError(f"{Path(directory) / 'config.json'}: {error}") from None
        path = Path(directory) / WEIGHTS
        if not path.exists():
            raise FileNotFoundError(2, "no weights", str(path))
        try:
            head.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ValueError(f"{path} is broken or belongs to another config: {_line(error)}") from None
        listed = head.shortlist
        if listed is not None and not 0 <= int(listed.min()) <= int(listed.max()) < head.config.vocabulary:
            raise ValueError(f"{path}: shortlist must hold tokens from 0 to {head.config.vocabulary - 1}")
        return head.eval()


def holds_head(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory's config names a draft head."""
    try:
        config: Any = json.loads((Path(directory) / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
