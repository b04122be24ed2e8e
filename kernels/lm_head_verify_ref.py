"""Definition of ``lm_head_verify``: the output head, then ``verify_tree`` without filters."""

from __future__ import annotations

import torch
from torch import Tensor

from specfuse.kernels.verify_tree_ref import verify_tree_ref


def lm_head_verify_ref(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    temperature: Tensor,
    seed: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits in the storage dtype, as ``nn.Linear`` returns them, and the walk over them.

    Shapes and meaning are those of :func:`specfuse.ops.lm_head_verify.lm_head_verify`, which calls this where
    no GPU kernel runs.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    top_k, top_p = torch.zeros_like(num_nodes), torch.ones_like(temperature)
    min_p = torch.zeros_like(temperature)
    rules = (temperature, top_k, top_p, min_p, seed, positions)
    return verify_tree_ref(logits, tokens, parents, num_nodes, *rules)
