"""Trees, logits and a plain-Python oracle for the tests of ``verify_tree``."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from specfuse.tree import TokenTree

MASK32 = 0xFFFFFFFF
PER_ROW = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
    "positions": torch.int64,
}
DEFAULTS = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "positions": 0}

SAMPLED = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
FILTERED = {"temperature": 1.3, "top_k": 3, "top_p": 0.8, "min_p": 0.1}


def arguments(
    logits: Tensor, tokens: Tensor, parents: Tensor, num_nodes: Tensor | None = None, **per_row: object
) -> tuple[Tensor, ...]:
    """The op's ten tensors; parameters are numbers, lists or tensors, seeds count up from 0 by default."""
    B, N, _ = logits.shape
    if num_nodes is None:
        num_nodes = torch.full((B,), N, dtype=torch.int32)
    values: dict[str, object] = {**DEFAULTS, "seed": torch.arange(B), **per_row}
    rows = [
        torch.as_tensor(values[name], dtype=dtype).expand(B).contiguous() for name, dtype in PER_ROW.items()
    ]
    return logits, tokens, parents, num_nodes, *rows


def parent_arrays(num_nodes: int) -> list[tuple[int, ...]]:
    """Every tree with this many nodes, parents before children."""
    return [(-1, *rest) for rest in product(*(range(i) for i in range(1, num_nodes)))]


def random_tree(generator: torch.Generator, B: int, N: int, V: int) -> tuple[Tensor, Tensor]:
    """Tokens from the first few ids, so that walks go deep; siblings may repeat a token."""
    parents = torch.full((B, N), -1, dtype=torch.int32)
    for i in range(1, N):
        parents[:, i] = torch.randint(0, i, (B,), generator=generator)
    return torch.randint(0, min(V, 4), (B, N), generator=generator), parents


def philox_oracle(counter: list[int], key: tuple[int, int]) -> list[int]:
    """Philox-4x32-10 on Python integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & MASK32, (p0 >> 32) ^ c[3] ^ k1, p0 & MASK32]
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c


def word_oracle(seed: int, position: int, token: int) -> int:
    counter = [token >> 2, position & MASK32, (position >> 32) & MASK32, 0]
    return philox_oracle(counter, (seed & MASK32, (seed >> 32) & MASK32))[token & 3]


def gumbel_oracle(seed: int, position: int, token: int) -> float:
    u = (word_oracle(seed, position, token) >> 8) * 2.0**-24
    return -math.log(-math.log(max(u, 2.0**-25)))


def kept_oracle(x: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    """Ids inside top-k, then top-p, then min-p, most probable first."""
    order = sorted((v for v in range(len(x)) if x[v] > -math.inf), key=lambda v: (-x[v], v))
    if 0 < top_k < len(order):
        order = [v for v in order if x[v] >= x[order[top_k - 1]]]
    weight = {v: math.exp(x[v] / temperature - x[order[0]] / temperature) for v in order}
    if top_p < 1.0:
        total, before, kept = sum(weight.values()), 0.0, []
        for v in order:
            if before >= top_p * total:
                break
            kept.append(v)
            before += weight[v]
        order = kept
    floor = math.log(min_p) if min_p > 0.0 else -math.inf  # weights may round to 1
    return [v for v in order if x[v] / temperature - x[order[0]] / temperature >= floor]


def emit_oracle(
    x: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> tuple[int, float]:
    """The emitted token and its log-probability; (-1, nan) where there is no distribution."""
    sampled = temperature > 0.0
    if any(math.isnan(v) for v in x) or max(x) == -math.inf or (sampled and max(x) == math.inf):
        return -1, math.nan
    if not sampled:
        kept, z, scores = list(range(len(x))), x, x
    else:
        kept = kept_oracle(x, temperature, top_k, top_p, min_p)
        z = [v / temperature for v in x]
        scores = [z[v] + gumbel_oracle(seed, position, v) for v in range(len(x))]
    token = min(kept, key=lambda v: (-scores[v], v))
    if z[token] == math.inf:
        return token, math.nan
    largest = max(z)
    return token, z[token] - largest - math.log(sum(math.exp(z[v] - largest) for v in kept))


def verify_oracle(
    logits: Tensor, tokens: Tensor, parents: Tensor, num_nodes: Tensor, *per_row: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``verify_tree`` written again from its contract, on Python numbers."""
    paths, lengths, nexts, logprobs = [], [], [], []
    N = logits.shape[1]
    for b, n in enumerate(num_nodes.tolist()):
        *rule, seed, position = (t[b].item() for t in per_row)
        path, lps, token = [], [], -1
        node = 0 if n else None
        while node is not None:
            path.append(node)
            token, lp = emit_oracle(logits[b, node].double().tolist(), *rule, seed, position + len(path))
            lps.append(lp)
            held = [c for c in range(node + 1, n) if parents[b, c] == node and tokens[b, c] == token]
            node = held[0] if held and token >= 0 else None
        paths.append(path + [-1] * (N - len(path)))
        lengths.append(len(path))
        nexts.append(token)
        logprobs.append(lps + [0.0] * (N - len(path)))
    return (
        torch.tensor(paths, dtype=torch.int32).reshape(-1, N),
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor(nexts, dtype=torch.int64),
        torch.tensor(logprobs, dtype=torch.float32).reshape(-1, N),
    )


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], atol: float = 1e-5) -> None:
    """Discrete outputs exactly, log-probabilities closely; names the first row that differs."""
    for name, a, e in zip(("path", "length", "next_token"), actual[:3], expected[:3], strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape, (
            f"{name}: {a.dtype} {a.shape} for {e.dtype} {e.shape}"
        )
        rows = sorted({row[0] for row in (a.cpu() != e.cpu()).nonzero().tolist()})
        assert not rows, f"{name} differs in rows {rows[:5]}: {a[rows[0]].tolist()} for {e[rows[0]].tolist()}"
    torch.testing.assert_close(actual[3].cpu(), expected[3].cpu(), atol=atol, rtol=1e-5, equal_nan=True)


def emitted(outputs: tuple[Tensor, ...], tokens: Tensor) -> list[list[int]]:
    """Per row the emitted tokens: those of the accepted drafts, then ``next_token``."""
    path, length, next_token, _ = outputs
    return [
        [*tokens[b, path[b, 1:n].long()].tolist(), int(next_token[b])] if n else []
        for b, n in enumerate(length.tolist())
    ]


def chain(tokens: list[int], logits: Tensor) -> tuple[Tensor, TokenTree]:
    return logits.unsqueeze(0), TokenTree.from_chains([tokens[0]], [tokens[1:]])


def leaning(tokens: list[int], V: int) -> Tensor:
    """Logits [N, V] whose argmax at node i is ``tokens[i]``."""
    logits = torch.zeros(len(tokens), V)
    logits[torch.arange(len(tokens)), torch.tensor(tokens)] = 5.0
    return logits
