"""Contract of ``lm_head_verify``, a prototype: the output head and ``verify_tree`` in one, without logits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specfuse.kernels.lm_head_verify_ref import lm_head_verify_ref
from specfuse.ops.verify_tree import MAX_NODES, AcceptedPath, check_values, empty_outputs, per_row_tensors

try:
    from specfuse.kernels import lm_head_verify as triton_kernels
except ImportError:  # no Triton: the eager reference is all there is
    triton_kernels = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from specfuse.tree import TokenTree

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor]

torch.library.define(
    "specfuse::lm_head_verify",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor parents, Tensor num_nodes, "
    "Tensor temperature, Tensor seed, Tensor positions) -> (Tensor, Tensor, Tensor, Tensor)",
)
_op = torch.ops.specfuse.lm_head_verify.default


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, *tree_and_rows: Tensor) -> None:
    def given(t: Tensor) -> str:
        return f"{list(t.shape)} {t.dtype} on {t.device}"

    if hidden.dim() != 3 or hidden.dtype not in _DTYPES or hidden.shape[1] > MAX_NODES:
        wanted = f"[B, N, D] float32, float16 or bfloat16 with at most {MAX_NODES} nodes"
        raise ValueError(f"hidden must be {wanted}, got {given(hidden)}")
    B, N, D = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != D or not 1 <= weight.shape[0] < 2**31:
        raise ValueError(f"weight must be [V, {D}] with 1 <= V < 2**31, got {given(weight)}")
    rows = {"temperature": torch.float32, "seed": torch.int64, "positions": torch.int64}
    expected = [
        ("weight", weight.shape, hidden.dtype),
        ("tokens", (B, N), torch.int64),
        ("parents", (B, N), torch.int32),
        ("num_nodes", (B,), torch.int32),
        *((name, (B,), dtype) for name, dtype in rows.items()),
    ]
    tensors = [weight, *tree_and_rows]
    if bias is not None:
        expected.append(("bias", weight.shape[:1], hidden.dtype))
        tensors.append(bias)
    for (name, shape, dtype), t in zip(expected, tensors, strict=True):
        if t.shape != shape or t.dtype != dtype or t.device != hidden.device:
            raise ValueError(f"{name} must be {list(shape)} {dtype} on {hidden.device}, got {given(t)}")


@torch.library.register_fake("specfuse::lm_head_verify")
def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Tensor) -> _Outputs:
    _check(hidden, weight, bias, *args)
    return empty_outputs(hidden)


def _reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Tensor) -> _Outputs:
    _check(hidden, weight, bias, *args)
    num_nodes, temperature = args[2:4]
    off = torch.zeros_like(temperature)
    check_values(
        hidden.shape[1], num_nodes, temperature, torch.zeros_like(num_nodes), off + 1.0, off, *args[4:]
    )
    return lm_head_verify_ref(hidden, weight, bias, *args)


torch.library.impl("specfuse::lm_head_verify", "default", _reference)

if triton_kernels is not None:

    @torch.library.impl("specfuse::lm_head_verify", "cuda")
    def _cuda(hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Tensor) -> _Outputs:
        _check(hidden, weight, bias, *args)
        with torch.cuda.device(hidden.device):
            return triton_kernels.lm_head_verify(
                hidden, weight, None if bias is None else bias.contiguous(), *(t.contiguous() for t in args)
            )


def _require_opt_in(experimental: bool) -> None:
    if not experimental and os.environ.get("SPECFUSE_EXPERIMENTAL") != "1":
        raise RuntimeError(
            "lm_head_verify is a prototype that no GPU has measured: pass experimental=True or set "
            "SPECFUSE_EXPERIMENTAL=1 to use it, or call verify_tree on the logits"
        )


def lm_head_verify(
    hidden: Tensor,
    weight: Tensor,
    tree: TokenTree,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    positions: int | Tensor | None = None,
    experimental: bool = False,
) -> AcceptedPath:
    """Verify a draft tree from the last hidden states: the logits are not written to memory. A prototype.

    Equivalent to::

        verify_tree(torch.nn.functional.linear(hidden, weight, bias), tree, temperature=..., seed=..., ...)

    Logits are accumulated in float32 and rounded to the dtype of ``hidden`` before they are compared, as a
    head returns them. A GPU adds in another order than the head's own matrix product, so that a logit can be
    rounded to its neighbour; on the CPU both are the same function.

    Args:
        hidden: ``[B, N, D]`` float32, float16 or bfloat16, any strides; what the output head would be given.
        weight: ``[V, D]`` the head's weight, in the dtype of ``hidden``.
        tree: the drafted tokens, N nodes wide (at most 1024).
        bias: ``[V]`` or None.
        temperature: as in :func:`verify_tree`, as are seed and positions; 0 for greedy decoding.
        top_k: must be off (0): a filter needs the whole row of logits. So must top_p (1) and min_p (0).
        top_p: see top_k.
        min_p: see top_k.
        seed: an integer s gives row b the seed ``s + b``; a tensor is used as it is.
        positions: absolute position of each root in its own sequence; None means 0.
        experimental: True, or SPECFUSE_EXPERIMENTAL=1 in the environment, admits that this is a prototype.

    Returns:
        The :class:`AcceptedPath` of ``verify_tree`` on the same logits.

    Raises:
        RuntimeError: where nobody has opted in.
        ValueError: naming the argument and its value, for a filter, a wrong shape, dtype, device or range.

    Source: Gumbel-max sampling over tiles; Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
        Models", ICLR 2025, for logits that are never written.
    """
    _require_opt_in(experimental)
    for name, value, off in (("top_k", top_k, 0), ("top_p", top_p, 1), ("min_p", min_p, 0)):
        if isinstance(value, Tensor) or value != off:
            raise ValueError(f"{name} must be {off} (off) in lm_head_verify, got {value}: use verify_tree")
    if hidden.dim() != 3:
        raise ValueError(f"hidden must be [B, N, D], got {list(hidden.shape)}")
    rows = per_row_tensors(hidden, temperature, 0, 1.0, 0.0, seed, positions)
    outputs = _op(
        hidden.detach(),
        weight.detach(),
        None if bias is None else bias.detach(),
        tree.tokens,
        tree.parents,
        tree.num_nodes,
        rows[0],
        rows[4],
        rows[5],
    )
    return AcceptedPath(*outputs)
