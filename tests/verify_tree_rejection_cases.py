"""Drafters, drafted trees and arguments for the tests of ``verify_tree_rejection``."""

from __future__ import annotations

import torch
from torch import Tensor
from verify_tree_cases import arguments

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE_IDS = ["fp32", "fp16", "bf16"]
WITH = {"without": False, "with": True}  # replacement


def op_arguments(
    logits: Tensor,
    draft_probs: Tensor,
    draft_ids: Tensor | None,
    with_replacement: bool,
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor | None = None,
    **per_row: object,
) -> tuple:
    """The op's thirteen arguments; what ``arguments`` fills in, with temperature 1 by default."""
    rest = arguments(logits, tokens, parents, num_nodes, **{"temperature": 1.0, **per_row})
    return logits, draft_probs, draft_ids, with_replacement, *rest[1:]


def to_sparse(q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of q [..., V] and their ids."""
    values, ids = q.topk(min(k, q.shape[-1]), dim=-1)
    return values, ids


def to_dense(values: Tensor, ids: Tensor, V: int) -> Tensor:
    """q [..., V] of what ``values`` and ``ids`` say, padding left out."""
    inside = (ids >= 0) & (ids < V)
    dense = values.new_zeros(*ids.shape[:-1], V + 1)
    return dense.scatter(-1, ids.where(inside, V), values)[..., :V]


def draw_siblings(q: Tensor, count: int, with_replacement: bool, generator: torch.Generator) -> Tensor:
    """``count`` tokens per row of q [R, V] in the order of their draws, [R, count]."""
    return torch.multinomial(q, count, replacement=with_replacement, generator=generator)


def draw_tree(
    q: Tensor, parents: list[int], with_replacement: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens [B, N] of trees whose siblings are drawn from q [B, N, V], and their parents."""
    B = q.shape[0]
    tokens = torch.zeros(B, len(parents), dtype=torch.int64)
    for node in range(len(parents)):
        children = [c for c, parent in enumerate(parents) if parent == node]
        if children:
            tokens[:, children] = draw_siblings(q[:, node], len(children), with_replacement, generator)
    return tokens, torch.tensor(parents, dtype=torch.int32).expand(B, -1).contiguous()
