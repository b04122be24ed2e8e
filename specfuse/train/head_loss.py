"""A head unrolled along known text: the loss it learns from, and how often its drafts are right."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from specfuse.drafters.head_layer import DraftHead
from specfuse.train.head_batches import HeadRows

STATE_WEIGHT = 1.0
LATER = 0.8
"""How much each further level counts; fewer drafts get there."""


def unrolled(head: DraftHead, model: PreTrainedModel, rows: HeadRows, levels: int) -> Iterator[Tensor]:
    """What the head predicts as if the text before had been drafted: ``[M, T - 1, D]`` for each level.

    At level s, position i stands for a node s tokens behind what is committed: its hidden state is what the
    head itself predicted at level s - 1, position i - 1, and it looks at positions up to i - s.
    """
    known = rows.states
    count = known.shape[1]
    given = head.token_inputs(model.get_input_embeddings()(rows.tokens[:, 1:]))
    x = start = given + head.state_inputs(known)
    if rows.events is not None and head.events is not None:
        start = torch.cat([head.events(rows.events), start], dim=1)
    before = start.shape[1] - count
    turns = head.turns(start.shape[1], known.device)[None, : start.shape[1]]
    keys, values = head.keys_values(head.normed(start), turns)
    for level in range(levels):
        seen = torch.ones(count, start.shape[1], dtype=torch.bool, device=known.device).tril(before - level)
        # Positions with nothing before them are not asked for, but their softmax must be defined.
        seen[:, 0] = True
        queries = head.queries(head.normed(x), turns[:, before:])
        g = head.finish(x, F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen))
        yield g
        x = given + head.state_inputs(torch.cat([known[:, :1], g[:, :-1]], dim=1))


def asked(rows: HeadRows, level: int) -> Tensor:
    """``[M, T - 1]`` bool: the positions whose prediction a drafter would use at a level.

    Position i predicts token i + 2. Drafting begins behind the first token of an answer.
    """
    places = torch.arange(rows.states.shape[1], device=rows.tokens.device)
    return (places >= rows.first[:, None] - 1 + level) & (places < rows.lengths[:, None] - 2)


def head_loss(head: DraftHead, model: PreTrainedModel, rows: HeadRows, levels: int) -> Tensor:
    """Mean over levels of the divergence from the target's distribution and the distance from its states.

    The distribution is that over the tokens that the head may draft.
    """
    to_logits = head.logits_of(model.get_output_embeddings())
    every = asked(rows, 0)
    states = rows.states[:, 1:]
    with torch.no_grad():
        wanted = F.pad(states, (0, 0, 0, 1))[every]
        truth = to_logits(wanted).log_softmax(-1)
    total, weights = rows.states.new_zeros(()), 0.0
    for level, g in enumerate(unrolled(head, model, rows, levels)):
        part = asked(rows, level)[every]
        predicted = g[every][part]
        if not len(predicted):
            break
        said = to_logits(predicted).log_softmax(-1)
        divergence = F.kl_div(said, truth[part], log_target=True, reduction="batchmean")
        distance = F.smooth_l1_loss(predicted, wanted[part])
        total = total + LATER**level * (divergence + STATE_WEIGHT * distance)
        weights += LATER**level
    return total / max(weights, 1.0)


@torch.no_grad()
def count_hits(head: DraftHead, model: PreTrainedModel, rows: HeadRows, levels: int) -> tuple[Tensor, Tensor]:
    """How often the most likely token was the one said, by depth, along chains that were right so far.

    Returns:
        Hits and trials, ``[levels]`` int64 each. A trial at depth d is a position whose d - 1 drafts before
        were right.
    """
    to_logits = head.logits_of(model.get_output_embeddings())
    hits = torch.zeros(levels, dtype=torch.int64)
    trials = torch.zeros(levels, dtype=torch.int64)
    following = F.pad(rows.tokens[:, 2:], (0, 1))
    right = torch.ones_like(following, dtype=torch.bool)
    for level, g in enumerate(unrolled(head, model, rows, levels)):
        tried = right & asked(rows, level)
        best = to_logits(g).argmax(-1)
        hit = tried & ((best if head.shortlist is None else head.shortlist[best]) == following)
        hits[level], trials[level] = hit.sum(), tried.sum()
        # A chain that begins one position later is one position further along at the next level.
        right = F.pad(hit[:, :-1], (1, 0))
    return hits, trials
