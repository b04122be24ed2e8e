"""Hidden states, heads and trees for the tests of ``lm_head_verify``.

Values are multiples of 1/8 so small that every sum is exact in float32 in any order: all implementations have
the same logits, with ties, and must choose the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specfuse.kernels.verify_tree_ref import emit, verify_tree_ref

Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

RULES = {"greedy": [0.0], "sampled": [0.8], "mixed": [0.0, 1.3, 0.4]}


def eighths(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-8, 9, shape, generator=generator) / 8


def lm_head_arguments(
    B: int,
    N: int,
    D: int,
    V: int,
    dtype: torch.dtype,
    temperature: list[float] | None = None,
    bias: bool = False,
    num_nodes: list[int] | None = None,
    device: str = "cpu",
) -> Arguments:
    """The op's arguments; most nodes hold the token that their parent emits, so that walks go deep."""
    generator = torch.Generator().manual_seed(B * 1000 + N * 100 + D * 10 + V)
    hidden, weight = eighths(generator, B, N, D).to(dtype), eighths(generator, V, D).to(dtype)
    offset = eighths(generator, V).to(dtype) if bias else None
    parents = torch.full((B, N), -1, dtype=torch.int32)
    for i in range(1, N):
        parents[:, i] = torch.randint(max(0, i - 3), i, (B,), generator=generator)
    rules = [(temperature or [0.0])[b % len(temperature or [0.0])] for b in range(B)]
    seed, positions = torch.arange(B) * 7 - 3, torch.arange(B) + 2**33 + 5
    tokens = torch.randint(0, V, (B, N), generator=generator)
    logits = torch.nn.functional.linear(hidden, weight, offset)
    for b in range(B):
        depths = [0] * N
        for i in range(1, N):
            above = int(parents[b, i])
            depths[i] = depths[above] + 1
            if i % 4:
                token, _ = emit(logits[b, above], rules[b], 0, 1.0, 0.0, seed[b], positions[b] + depths[i])
                tokens[b, i] = token
    count = torch.tensor(num_nodes or [N] * B, dtype=torch.int32)
    arguments = (hidden, weight, offset, tokens, parents, count, torch.tensor(rules), seed, positions)
    return tuple(t if t is None else t.to(device) for t in arguments)  # type: ignore[return-value]


def expected_paths(arguments: Arguments) -> tuple[Tensor, ...]:
    """The definition, with logits rounded once from their exact values; on the CPU."""
    hidden, weight, bias, *tree, temperature, seed, positions = (
        t if t is None else t.cpu() for t in arguments
    )
    logits = torch.nn.functional.linear(
        hidden.float(), weight.float(), None if bias is None else bias.float()
    )
    off = torch.zeros_like(temperature)
    rules = (temperature, torch.zeros_like(tree[2]), off + 1.0, off, seed, positions)
    return verify_tree_ref(logits.to(hidden.dtype), *tree, *rules)
