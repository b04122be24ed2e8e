"""Shared by the tests of the corpus: both indexes, states, and what every proposed tree must keep."""

from __future__ import annotations

from typing import Any

import numpy as np

from specfuse.drafters import CorpusDrafter, DraftState
from specfuse.drafters.corpus_fallback import PythonCorpusIndex
from specfuse.ops import native

INDEXES = {"python": PythonCorpusIndex}
if native.cpu is not None:
    INDEXES["native"] = native.cpu.CorpusIndex


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def check_tree(drafted: tuple[np.ndarray, ...], max_nodes: int, max_depth: int) -> None:
    """What every proposal must keep, whatever the index holds."""
    tokens, parents, probs = (array.tolist() for array in drafted)
    assert len(tokens) == len(parents) == len(probs) <= max_nodes
    depth: list[int] = []
    for i, parent in enumerate(parents):
        assert -1 <= parent < i, (i, parent)
        depth.append(1 if parent < 0 else depth[parent] + 1)
        above = 1.0 if parent < 0 else probs[parent]
        assert 0.0 < probs[i] <= above, (i, probs[i], above)
    assert max(depth, default=0) <= max_depth
    assert len(set(zip(parents, tokens, strict=True))) == len(tokens), "duplicate siblings"
    assert probs == sorted(probs, reverse=True), "not best first"


def accepted(drafted: tuple[np.ndarray, ...], truth: list[int]) -> int:
    """How many tokens of ``truth`` the tree holds as a path from the root."""
    tokens, parents, _ = (array.tolist() for array in drafted)
    node, length = -1, 0
    for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent == node and length < len(truth) and token == truth[length]:
            node, length = i, length + 1
    return length


def row(answer: list[int], question: list[int], remaining: int = 50, **kwargs: Any) -> DraftState:
    return DraftState(prompts=[question], answers=[answer], active=[True], remaining=[remaining], **kwargs)


def passes_of(drafter: CorpusDrafter, answer: list[int], nodes: int = 16) -> int:
    """Target passes that the answer takes, the first of them with a tree before any token."""
    done = passes = 0
    while done < len(answer):
        tree = drafter.propose(row(answer[:done], [1], len(answer) - done), nodes)
        drafted = (tree.tokens[0, 1:].numpy(), tree.parents[0, 1:].numpy() - 1, tree.probs[0, 1:].numpy())
        done += accepted(drafted, answer[done:]) + 1
        passes += 1
    return passes


def filled(max_tokens: int = 100_000) -> CorpusDrafter:
    drafter = CorpusDrafter(max_tokens)
    rng = np.random.default_rng(4)
    for i in range(50):
        drafter.observe(rng.integers(0, 6, int(rng.integers(1, 40))).tolist(), question=[i % 3])
    return drafter
