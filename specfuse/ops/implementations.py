"""Which implementation each op uses on each device, and a short test that it gives the reference's answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specfuse.kernels.compact_kv_ref import compact_kv_ref
from specfuse.kernels.verify_tree_ref import verify_tree_ref

_NATIVE = {"cpu": ("CPU", "C++"), "cuda": ("CUDA", "CUDA")}


def implementations() -> dict[str, dict[str, str]]:
    """``{op: {device: name}}`` as the dispatcher will choose: "C++", "CUDA" or "eager reference"."""
    return {
        op: {
            device: name if _registered(op, key) else "eager reference"
            for device, (key, name) in _NATIVE.items()
        }
        for op in _SELF_TESTS
    }


def self_test() -> dict[str, str]:
    """``{op: "ok" or what went wrong}``: every op against its reference, on each device there is."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {op: "; ".join(_failures(run, devices)) or "ok" for op, run in _SELF_TESTS.items()}


def _registered(op: str, dispatch_key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"specfuse::{op}", dispatch_key)


def _failures(run: Callable[[str], bool], devices: list[str]) -> list[str]:
    failures = []
    for device in devices:
        try:
            if not run(device):
                failures.append(f"{device}: differs from the eager reference")
        except Exception as error:  # doctor reports whatever breaks rather than breaking itself
            failures.append(f"{device}: {type(error).__name__}: {error}")
    return failures


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


def _compact_kv(device: str) -> bool:
    expected = [torch.arange(2 * 3 * 9 * 4, dtype=torch.float32).reshape(2, 3, 9, 4) for _ in range(2)]
    actual = [t.to(device, copy=True) for t in expected]
    path = torch.tensor([[0, 2, 3, 5], [0, 1, 4, -1]], dtype=torch.int32)
    length, start = torch.tensor([4, 3], dtype=torch.int32), torch.tensor([1, 3])
    compact_kv_ref(expected, path, length, start)
    torch.ops.specfuse.compact_kv(actual, *(t.to(device) for t in (path, length, start)))
    return all(torch.equal(e, a.cpu()) for e, a in zip(expected, actual, strict=True))


_SELF_TESTS: dict[str, Callable[[str], bool]] = {"verify_tree": _verify_tree, "compact_kv": _compact_kv}
