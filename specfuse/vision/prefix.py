"""Which part of a prefill depends on pixels, whether it can be reused, and the key it is kept under."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Bypass(Exception):
    """This call can not be served from the cache; the text says why."""


@dataclass
class Prefill:
    """A forward call that fills an empty KV cache from a prompt with pixels.

    Attributes:
        input_ids: int64 [B, S].
        pixels: forward's pixel arguments by name; their rows belong to the rows of the prompt in order.
        attention_mask: None, [B, S], or 4-D [B or 1, 1, S, keys], bool or additive.
        position_ids: None or int64 [B or 1, S].
        cache_position: None or int64 [S].
        logits_to_keep: int > 0, or index tensor [kept].
        past: the KV cache, empty.
        options: everything else, passed on as it is.
    """

    input_ids: Tensor
    pixels: dict[str, Tensor]
    attention_mask: Tensor | None
    position_ids: Tensor | None
    cache_position: Tensor | None
    logits_to_keep: int | Tensor
    past: Any
    options: dict[str, Any]


@dataclass(frozen=True)
class RowPrefix:
    """Slots `[first, end)` of one prompt row: from its first real token to its last visual token.

    A row without visual tokens has `end == first`: the slots before `first` are padding, nothing is reused.
    """

    first: int
    end: int
    start_position: int

    @property
    def length(self) -> int:
        """Tokens P of the prefix."""
        return self.end - self.first


def find_prefixes(call: Prefill, visual_ids: list[int]) -> list[RowPrefix]:
    """The visual prefix of every row.

    Raises:
        Bypass: a prefix that is not plain causal text and pixels, or logits wanted inside a prefix.
    """
    ids = call.input_ids.cpu()
    is_visual = torch.isin(ids, torch.tensor(visual_ids))
    slots = torch.arange(1, ids.shape[1] + 1)
    ends = (is_visual * slots).amax(dim=1).tolist()
    if not any(ends):
        raise Bypass("no placeholder tokens")
    if _first_kept(call) < max(ends):
        raise Bypass("logits wanted inside the visual prefix")
    firsts = _first_tokens(call.attention_mask, ends, ids.shape)
    rows = []
    for row, (first, end) in enumerate(zip(firsts, ends, strict=True)):
        if 0 < end <= first:
            raise Bypass("visual tokens in the padding")
        rows.append(RowPrefix(first, end or first, _start_position(call.position_ids, row, first, end)))
    return rows


def _first_kept(call: Prefill) -> int:
    length = call.input_ids.shape[1]
    if isinstance(call.logits_to_keep, int):
        return length - call.logits_to_keep
    kept = call.logits_to_keep
    return int(torch.where(kept < 0, kept + length, kept).min())


def _start_position(position_ids: Tensor | None, row: int, first: int, end: int) -> int:
    """Position id of the first real token; the rest of the prefix must count up from it."""
    if position_ids is None:
        return first
    if end == 0:
        return 0
    positions = position_ids[row if position_ids.shape[0] > 1 else 0, first:end].cpu()
    if not torch.equal(positions - positions[0], torch.arange(end - first)):
        raise Bypass("position ids of the prefix are not contiguous")
    return int(positions[0])


def _first_tokens(mask: Tensor | None, ends: list[int], shape: torch.Size) -> list[int]:
    """Slot of the first real token of each row.

    Raises where the prefix' attention is not causal behind left padding.
    """
    batch, length = shape
    if mask is None:
        return [0] * batch
    if mask.ndim == 2 and mask.shape == shape:
        real = mask.cpu() != 0
        firsts: list[int] = real.int().argmax(dim=1).tolist()
        for row, (first, end) in enumerate(zip(firsts, ends, strict=True)):
            if not bool(real[row, first:end].all()):
                raise Bypass("attention mask has holes inside the prefix")
        return firsts
    if mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1 and mask.shape[2] == length:
        rows = mask[:, 0].expand(batch, -1, -1)
        return [_first_token_4d(rows[row], end) for row, end in enumerate(ends)]
    raise Bypass(f"attention mask of shape {tuple(mask.shape)}")


def _first_token_4d(mask: Tensor, end: int) -> int:
    """The same from one row's mask [S, keys].

    Bool (True attends) or additive (0 attends, very negative does not).
    """
    length = mask.shape[0]
    seen = mask if mask.dtype == torch.bool else mask == 0
    if end == 0:
        # A padded query may see itself, so that its softmax is defined; what another query sees is a token.
        others = ~torch.eye(length, dtype=torch.bool, device=mask.device)
        attended = (seen[:, :length] & others).any(dim=0)
        return int(attended.int().argmax())
    first = int(seen[end - 1].int().argmax())
    prefix = seen[first:end]
    if mask.dtype != torch.bool:
        blocked = mask[first:end] <= torch.finfo(mask.dtype).min / 2
        if not bool((prefix | blocked).all()):
            raise Bypass("attention mask biases the prefix")
    causal = torch.ones(end - first, end - first, dtype=torch.bool, device=mask.device).tril()
    outside = bool(prefix[:, :first].any()) or bool(prefix[:, end:].any())
    if outside or not torch.equal(prefix[:, first:end], causal):
        raise Bypass("attention of the prefix is not causal")
    return first


def prefix_key(
    state: str,
    input_ids: Tensor,
    start_position: int,
    pixels: Mapping[str, Tensor],
    modality: Mapping[str, str],
) -> bytes:
    """Content key of one visual prefix.

    Args:
        state: what else decides the result: model fingerprint, dtype, attention implementation, options.
        input_ids: prefix tokens, int64 [P].
        start_position: position id of the first of them.
        pixels: the row's pixel tensors by argument name.
        modality: argument name -> "image" or "video", so that renamed arguments give the same key.

    Returns:
        blake2b digest, 32 bytes.
    """
    digest = hashlib.blake2b(digest_size=32)
    digest.update(repr((state, start_position, tuple(input_ids.shape))).encode())
    digest.update(input_ids.cpu().contiguous().numpy().tobytes())
    for name in sorted(pixels, key=lambda name: modality[name]):
        values = pixels[name].detach()
        digest.update(repr((modality[name], values.dtype, tuple(values.shape))).encode())
        digest.update(values.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.digest()
