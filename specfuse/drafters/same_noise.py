"""Drafts picked with the target's own noise: the same random numbers choose, so alike models choose alike."""

from __future__ import annotations

import torch
from torch import Tensor

from specfuse.drafters.base import DraftState
from specfuse.tree import TokenTree


def samples(state: DraftState) -> bool:
    """Whether the target samples in a way that a drafter can follow."""
    return state.choice is not None and state.choice.temperature > 0 and state.choice.processors is None


def prompt_lengths(state: DraftState) -> Tensor:
    """``[B]`` int64 tokens of each prompt, as the target's noise counts."""
    given = state.prompt_lengths
    return torch.tensor([len(prompt) for prompt in state.prompts] if given is None else list(given))


def root_positions(state: DraftState) -> Tensor:
    """``[B]`` int64 absolute position of each row's last committed token, as the target's noise counts."""
    return prompt_lengths(state) + torch.tensor([len(answer) - 1 for answer in state.answers])


def pick_alike(state: DraftState, logits: Tensor, positions: Tensor) -> Tensor:
    """The tokens that the target would pick if its logits were these.

    Args:
        state: of a call that samples.
        logits: ``[B, q, V]`` of q nodes at one depth.
        positions: ``[B]`` or ``[B, q]`` absolute position of the nodes of each row.

    Returns:
        ``[B, q]`` int64 token ids.
    """
    batch, width, vocab = logits.shape
    flat = logits.reshape(batch * width, 1, vocab)
    roots = TokenTree.from_parents([[0]] * len(flat), [[-1]] * len(flat)).to(flat.device)
    picked = state.choice.pick(
        flat,
        roots,
        positions.reshape(batch, -1).expand(batch, width).reshape(-1),
        state.choice.seeds.to(flat.device).repeat_interleave(width),
    )
    # -1 (a row without a distribution) becomes token 0: it is only a draft.
    return picked.next_token.clamp(min=0).reshape(batch, width)
