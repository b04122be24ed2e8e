"""Definition of ``verify_tree_rejection``: drafts drawn from q are accepted so that p is what comes out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specfuse.kernels.philox_ref import COIN, RESIDUAL, gumbel, uniform
from specfuse.kernels.verify_tree_ref import emit, filter_logits


def draft_distribution(probs: Tensor, ids: Tensor | None, V: int) -> Tensor | None:
    """Q [V] float64, not normalised, from a dense row or from (id, probability) pairs; None if it is none.

    Ids outside the vocabulary are padding.
    """
    q = probs.double()
    if ids is not None:
        inside = (ids >= 0) & (ids < V)
        q = q.new_zeros(V).index_put((ids[inside],), q[inside], accumulate=True)
    return q if bool((q >= 0).all()) and bool((q < math.inf).all()) else None


def accept_child(
    p: Tensor, q: Tensor, drafts: list[int], coins: list[float], with_replacement: bool
) -> tuple[int | None, Tensor]:
    """The index of the accepted draft, None if there is none, and what is left of p [V] then.

    ``drafts`` were drawn from q [V] in this order. A draft that q cannot have produced is passed over.
    """
    for i, (token, u) in enumerate(zip(drafts, coins, strict=True)):
        if not 0 <= token < q.numel() or not q[token] > 0.0:
            continue
        q = q / q.sum()
        if u * q[token] < p[token]:  # with probability min(1, p / q), never where p is 0
            return i, p
        left = (p - q).clamp_min(0.0)
        if left.sum() > 0.0:  # 0 only by rounding: a rejection has probability 0 where p = q
            p = left / left.sum()
        if not with_replacement:
            q = q.index_fill(0, torch.tensor(token, device=q.device), 0.0)
    return None, p


def verify_tree_rejection_ref(
    logits: Tensor,
    draft_probs: Tensor,
    draft_ids: Tensor | None,
    with_replacement: bool,
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Walk each tree from its root: accept one of the children or emit from what they leave of p.

    Shapes and meaning are those of :func:`specfuse.ops.verify_tree_rejection`, which calls this where no
    native code is built.
    """
    B, N, V = logits.shape
    path = torch.full((B, N), -1, dtype=torch.int32)
    length = torch.zeros(B, dtype=torch.int32)
    next_token = torch.full((B,), -1, dtype=torch.int64)
    logprobs = torch.zeros(B, N)
    # Parameters are read on the host: this is the definition, not the fast path.
    held, above, counts = tokens.tolist(), parents.tolist(), num_nodes.tolist()
    rules = list(zip(temperature.tolist(), top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True))
    for b in range(B):
        node = 0 if counts[b] else None
        while node is not None:
            depth = int(length[b])
            path[b, depth] = node
            length[b] += 1
            children = [c for c in range(node + 1, counts[b]) if above[b][c] == node]
            drafts = [held[b][c] for c in children]
            row_ids = None if draft_ids is None else draft_ids[b, node]
            # A leaf's q is not read.
            q = draft_distribution(draft_probs[b, node], row_ids, V) if drafts else logits.new_zeros(V)
            noise = (seed[b], positions[b] + depth + 1)
            token, logprobs[b, depth], chosen = _step(
                logits[b, node], q, drafts, rules[b], noise, with_replacement
            )
            next_token[b] = token
            node = None if chosen is None else children[chosen]
    device = logits.device
    return path.to(device), length.to(device), next_token.to(device), logprobs.to(device)


def _step(
    row: Tensor,
    q: Tensor | None,
    drafts: list[int],
    rule: tuple[float, int, float, float],
    noise: tuple[Tensor, Tensor],
    with_replacement: bool,
) -> tuple[int, float, int | None]:
    """At one node: the emitted token, its log-probability, and the index of the child that holds it."""
    temperature, top_k, top_p, min_p = rule
    if temperature == 0.0:
        token, logprob = emit(row, *rule, *noise)
    else:
        x = row.double()
        if q is None or x.isnan().any() or x.max().isinf():
            return -1, math.nan, None
        logp = filter_logits(x / temperature, top_k, top_p, min_p).log_softmax(0)
        coins = uniform(*noise, torch.arange(len(drafts), device=x.device), COIN).tolist()
        chosen, left = accept_child(logp.exp(), q, drafts, coins, with_replacement)
        if chosen is not None:
            return drafts[chosen], float(logp[drafts[chosen]]), chosen
        scores = left.log() + gumbel(*noise, torch.arange(x.numel(), device=x.device), RESIDUAL)
        token = int((scores == scores.max()).nonzero()[0])  # ties go to the lowest id
        logprob = float(logp[token])
    # A child that q cannot have produced is accepted where the emitted token happens to be its own.
    return token, logprob, next((i for i, draft in enumerate(drafts) if 0 <= token == draft), None)
