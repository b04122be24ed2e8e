"""Definition of ``verify_tree``: the greedy walk of a draft tree over (perturbed) target logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specfuse.kernels.philox_ref import gumbel


def filter_logits(z: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """``z`` [V] float64 with every token outside top-k, then top-p, then min-p set to -inf.

    Equivalent to transformers' TopK, TopP and MinP warpers in that order. In top-p a token stays if the mass
    strictly before it, in (probability descending, id ascending) order, is below ``top_p``; so at least one
    stays.
    """
    if 0 < top_k < z.numel():
        z = z.masked_fill(z < z.topk(top_k).values[-1], -math.inf)
    top = z.max()
    weights = torch.exp(z - top)  # not normalised: the rule below is homogeneous
    if top_p < 1.0:
        ids = z.sort(descending=True, stable=True).indices  # of logits: weights may round to equal ones
        mass = weights[ids].cumsum(0)
        before = torch.cat((mass.new_zeros(1), mass[:-1]))
        z = z.index_fill(0, ids[before >= top_p * mass[-1]], -math.inf)
    return z.masked_fill(z - top < math.log(min_p), -math.inf) if min_p > 0.0 else z


def emit(
    row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: Tensor, position: Tensor
) -> tuple[int, float]:
    """The token that the target emits from logits ``row`` [V] and its log-probability; (-1, nan) if none."""
    x = row.double()
    none = (-1, math.nan)
    if x.isnan().any() or (x == -math.inf).all():
        return none
    if temperature == 0.0:
        token = int((x == x.max()).nonzero()[0])  # ties go to the lowest id
        return token, float(x.log_softmax(0)[token])
    if (x == math.inf).any():
        return none
    z = filter_logits(x / temperature, top_k, top_p, min_p)
    perturbed = z + gumbel(seed, position, torch.arange(z.numel(), device=z.device))
    token = int((perturbed == perturbed.max()).nonzero()[0])
    return token, float(z.log_softmax(0)[token])


def verify_tree_ref(
    logits: Tensor,
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
    """Walk each tree from its root: emit a token, descend into the child that holds it, stop where none does.

    Shapes and meaning are those of :func:`specfuse.ops.verify_tree`, which calls this where no native code is
    built.
    """
    B, N, _ = logits.shape
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
            token, logprobs[b, depth] = emit(logits[b, node], *rules[b], seed[b], positions[b] + depth + 1)
            next_token[b] = token
            children = (c for c in range(node + 1, counts[b]) if above[b][c] == node)
            node = next((c for c in children if token >= 0 and held[b][c] == token), None)
    device = logits.device
    return path.to(device), length.to(device), next_token.to(device), logprobs.to(device)
