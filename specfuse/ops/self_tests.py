"""A short self-test of every op on one device against its eager reference: the table behind ``doctor``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specfuse.kernels.adapter_cosine_ref import adapter_cosine_ref
from specfuse.kernels.compact_kv_ref import compact_kv_ref
from specfuse.kernels.lm_head_verify_ref import lm_head_verify_ref
from specfuse.kernels.tree_attention_ref import tree_attention_ref
from specfuse.kernels.verify_tree_ref import verify_tree_ref
from specfuse.kernels.verify_tree_rejection_ref import verify_tree_rejection_ref


class SelfTest(NamedTuple):
    """One op: whether a small case agrees with the reference, and what its fast implementations are."""

    run: Callable[[str], bool]  # device -> agrees
    cuda: str  # "CUDA" or "Triton"
    cpu: str | None = None  # "C++", or None where the eager reference is all there is on a CPU


def _verify_tree_case() -> tuple[Tensor, ...]:
    """A greedy row, a sampled row and a filtered one over a tree whose branches the walk can take."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 97, generator=generator)
    parents = torch.tensor([-1, 0, 0, 1, 1, 2, 2], dtype=torch.int32).repeat(3, 1)
    tokens = torch.tensor([0, 1, 2, 3, 4, 5, 6]).repeat(3, 1)
    logits[:, 0, 2] += 20.0
    logits[:, 2, 6] += 20.0
    return (
        logits,
        tokens,
        parents,
        torch.full((3,), 7, dtype=torch.int32),
        torch.tensor([0.0, 1.0, 0.7]),
        torch.tensor([0, 0, 20], dtype=torch.int32),
        torch.tensor([1.0, 1.0, 0.9]),
        torch.tensor([0.0, 0.0, 0.05]),
        torch.arange(3),
        torch.arange(3) + 1000,
    )


def _verify_tree(device: str) -> bool:
    case = _verify_tree_case()
    expected = verify_tree_ref(*case)
    actual = torch.ops.specfuse.verify_tree(*(t.to(device) for t in case))
    discrete = all(torch.equal(e, a.cpu()) for e, a in zip(expected[:3], actual[:3], strict=True))
    return discrete and torch.allclose(expected[3], actual[3].cpu(), atol=1e-5)


def _verify_tree_rejection(device: str) -> bool:
    """The rows of the case above, sampled, with the drafter's probabilities dense and as their 9 largest."""
    logits, *rest = _verify_tree_case()
    draft_probs = (0.7 * logits).softmax(-1)
    for probs, ids in ((draft_probs, None), draft_probs.topk(9)):
        case: tuple[Any, ...] = (logits, probs, ids, False, *rest)
        expected = verify_tree_rejection_ref(*case)
        there = (x.to(device) if isinstance(x, Tensor) else x for x in case)
        actual = torch.ops.specfuse.verify_tree_rejection(*there)
        if not all(torch.equal(e, a.cpu()) for e, a in zip(expected[:3], actual[:3], strict=True)):
            return False
        if not torch.allclose(expected[3], actual[3].cpu(), atol=1e-5):
            return False
    return True


def _compact_kv(device: str) -> bool:
    expected = [torch.arange(2 * 3 * 9 * 4, dtype=torch.float32).reshape(2, 3, 9, 4) for _ in range(2)]
    actual = [t.to(device, copy=True) for t in expected]
    path = torch.tensor([[0, 2, 3, 5], [0, 1, 4, -1]], dtype=torch.int32)
    length, start = torch.tensor([4, 3], dtype=torch.int32), torch.tensor([1, 3])
    compact_kv_ref(expected, path, length, start)
    torch.ops.specfuse.compact_kv(actual, *(t.to(device) for t in (path, length, start)))
    return all(torch.equal(e, a.cpu()) for e, a in zip(expected, actual, strict=True))


def _tree_attention(device: str) -> bool:
    """A padded and a ragged row, float16 on a GPU, where the fast implementation takes it."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, s, 64, generator=generator).to(dtype) for n, s in ((4, 5), (2, 60), (2, 60)))
    lengths, starts = torch.tensor([55, 20]), torch.tensor([0, 3])
    ancestors = torch.tensor([[0b1, 0b11, 0b101, 0b1011, 0b10000]] * 2)
    expected = tree_attention_ref(q.double(), k.double(), v.double(), lengths, ancestors, starts=starts)
    tensors = (t.to(device) for t in (q, k, v, lengths, ancestors))
    actual = torch.ops.specfuse.tree_attention(*tensors, None, None, starts.to(device), 0.125, 5, 55, "auto")
    return torch.allclose(expected, actual.double().cpu(), atol=1e-5 if device == "cpu" else 3e-3)


def _adapter_cosine(device: str) -> bool:
    """A residual MLP on rows and features that fill no tile."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 70), (33, 70), (33,), (70, 33), (70,), (5, 70))
    x, *weights, target = (torch.randn(shape, generator=generator) for shape in shapes)
    expected = adapter_cosine_ref(x.double(), [w.double() for w in weights], target.double(), 0.0, 1e-8)
    actual = torch.ops.specfuse.adapter_cosine(
        x.to(device), [w.to(device) for w in weights], target.to(device), 0.0, 1e-8, True
    )
    return torch.allclose(expected[0], actual[0].double().cpu(), atol=1e-5)


def _lm_head_verify(device: str) -> bool:
    _, *tree, temperature, _, _, _, seed, positions = _verify_tree_case()
    generator = torch.Generator().manual_seed(0)
    # Multiples of 1/8: sums are exact in any order, so that rounding cannot change a token.
    hidden, weight = (
        torch.randint(-8, 9, shape, generator=generator) / 8 for shape in ((3, 7, 32), (97, 32))
    )
    rest = (*tree, temperature, seed, positions)
    expected = lm_head_verify_ref(hidden, weight, None, *rest)
    on_device = (hidden.to(device), weight.to(device), None, *(t.to(device) for t in rest))
    actual = torch.ops.specfuse.lm_head_verify(*on_device)
    discrete = all(torch.equal(e, a.cpu()) for e, a in zip(expected[:3], actual[:3], strict=True))
    return discrete and torch.allclose(expected[3], actual[3].cpu(), atol=1e-5)


SELF_TESTS: dict[str, SelfTest] = {
    "adapter_cosine": SelfTest(_adapter_cosine, cuda="Triton"),
    "tree_attention": SelfTest(_tree_attention, cuda="Triton"),
    "verify_tree": SelfTest(_verify_tree, cuda="CUDA", cpu="C++"),
    "verify_tree_rejection": SelfTest(_verify_tree_rejection, cuda="CUDA", cpu="C++"),
    "compact_kv": SelfTest(_compact_kv, cuda="CUDA", cpu="C++"),
    "lm_head_verify": SelfTest(_lm_head_verify, cuda="Triton"),
}
