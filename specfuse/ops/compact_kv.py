"""Contract of ``compact_kv``: the accepted path of a tree moves behind the prefix of the KV cache."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from specfuse.kernels.compact_kv_ref import compact_kv_ref
from specfuse.ops import native

torch.library.define(
    "specfuse::compact_kv", "(Tensor(a!)[] kv, Tensor path, Tensor length, Tensor start) -> ()"
)
_op = torch.ops.specfuse.compact_kv.default


def _check(kv: Sequence[Tensor], path: Tensor, length: Tensor, start: Tensor) -> None:
    if path.dim() != 2 or path.dtype != torch.int32:
        raise ValueError(f"path must be [B, K] int32, got {list(path.shape)} {path.dtype}")
    B = path.shape[0]
    for name, t, dtype in (("length", length, torch.int32), ("start", start, torch.int64)):
        if t.shape != (B,) or t.dtype != dtype or t.device != path.device:
            raise ValueError(
                f"{name} must be [{B}] {dtype} on {path.device}, got {list(t.shape)} {t.dtype} on {t.device}"
            )
    for i, t in enumerate(kv):
        if t.dim() != 4 or t.shape[0] != B or t.device != path.device:
            raise ValueError(
                f"kv[{i}] must be [{B}, G, Smax, D] on {path.device}, got {list(t.shape)} on {t.device}"
            )
        if t.stride(3) != 1 and t.shape[3] > 1:
            raise ValueError(
                f"kv[{i}] must be contiguous in its last dimension, got strides {list(t.stride())}"
            )
        if t.element_size() not in (1, 2, 4, 8):
            raise ValueError(f"kv[{i}] must have elements of 1, 2, 4 or 8 bytes, got {t.dtype}")


@torch.library.register_fake("specfuse::compact_kv")
def _fake(kv: Sequence[Tensor], path: Tensor, length: Tensor, start: Tensor) -> None:
    _check(kv, path, length, start)


def _reference(kv: Sequence[Tensor], path: Tensor, length: Tensor, start: Tensor) -> None:
    _check(kv, path, length, start)
    _check_values(kv, path, length, start)
    compact_kv_ref(list(kv), path, length, start)


torch.library.impl("specfuse::compact_kv", "default", _reference)


def _check_values(kv: Sequence[Tensor], path: Tensor, length: Tensor, start: Tensor) -> None:
    """The checks of csrc/compact_kv_cpu.cpp, in its words."""
    slots = min((t.shape[2] for t in kv), default=0)
    rows = zip(path.tolist(), length.tolist(), start.tolist(), strict=True)
    for row, (nodes, n, first) in enumerate(rows):
        if not 0 <= n <= len(nodes):
            message, value = "length must lie between 0 and the number of path slots", n
        elif (wrong := _not_increasing(nodes[:n])) is not None:
            message, value = "path must increase strictly from node 0 along each row", wrong
        elif n > 1 and kv and (first < 0 or first + nodes[n - 1] >= slots):
            message, value = "start plus the last path node must lie inside every kv tensor", first
        else:
            continue
        raise ValueError(f"{message}, got {value} in row {row}")
    for t in kv:
        _check_memory(t)


def _not_increasing(nodes: list[int]) -> int | None:
    """The first node that does not lie behind the one before it and where the tree may have it."""
    pairs = enumerate(itertools.pairwise(nodes), start=1)
    return next((node for i, (previous, node) in pairs if node <= previous or node < i), None)


def _check_memory(t: Tensor) -> None:
    if any(step == 0 and count > 1 for step, count in zip(t.stride(), t.shape, strict=True)):
        raise ValueError(
            f"kv must not share memory between slots, heads or rows, got strides {list(t.stride())}"
        )


_KV_TENSOR = struct.Struct("7q")  # KvTensor of csrc/compact_kv.h
_DLPACK_DEVICES = {"cpu": 1, "cuda": 2}


def _table(kv: Sequence[Tensor], path: Tensor, length: Tensor, start: Tensor) -> bytes:
    """The KvTensor of each cache tensor, one after the other."""
    device, rows = path.device, []
    if native.cpu is not None and device.type in _DLPACK_DEVICES:
        table = native.cpu.kv_table(kv, path.shape[0], _DLPACK_DEVICES[device.type], device.index or 0)
        if table is not None:
            return table
    _check(kv, path, length, start)
    for t in kv:
        shape, stride, size = t.shape, t.stride(), t.element_size()
        _check_memory(t)
        # The stride of a dimension of one is of no use, and must not spoil the alignment.
        b, g, s = (step * size if count > 1 else 0 for step, count in zip(stride[:3], shape, strict=False))
        rows.append(_KV_TENSOR.pack(t.data_ptr(), b, g, s, shape[1], shape[2], shape[3] * size))
    return b"".join(rows)


def _native_call(kv: Sequence[Tensor], path: Tensor, length: Tensor, start: Tensor) -> tuple:
    """Arguments of the native functions (see csrc/bindings_cpu.cpp) and what must stay alive meanwhile."""
    _check((), path, length, start)
    inputs = [t.contiguous() for t in (path, length, start)]
    table = _table(kv, path, length, start)
    return (table, *path.shape, *(t.data_ptr() for t in inputs)), inputs


if native.cpu is not None:

    @torch.library.impl("specfuse::compact_kv", "cpu")
    def _cpu(kv: Sequence[Tensor], path: Tensor, length: Tensor, start: Tensor) -> None:
        call, _inputs = _native_call(kv, path, length, start)
        native.cpu.compact_kv(*call)


if native.cuda is not None:

    @torch.library.impl("specfuse::compact_kv", "cuda")
    def _cuda(kv: Sequence[Tensor], path: Tensor, length: Tensor, start: Tensor) -> None:
        call, _inputs = _native_call(kv, path, length, start)
        with torch.cuda.device(path.device):
            native.cuda.compact_kv(*call, torch.cuda.current_stream().cuda_stream)


def compact_kv(kv: Sequence[Tensor], path: Tensor, length: Tensor, start: Tensor) -> None:
    """Keep the accepted path of a tree in the KV cache: its slots move up behind the prefix, in place.

    Equivalent to, for every tensor and row b, with ``n = length[b]`` and ``s = start[b]``::

        kv[b, :, s + 1 : s + n] = kv[b, :, s + path[b, 1:n]].clone()

    Nothing else changes. The slots that become stale keep what they hold.

    Args:
        kv: the keys and values of all layers, each ``[B, G, Smax, D]`` in any dtype of 1, 2, 4 or 8 bytes.
            Only D must be contiguous; G, Smax, D and strides may differ between tensors. Changed in place;
            no slot may lie in memory twice, in one tensor or in two.
        path: ``[B, K]`` int32 visited nodes as :func:`verify_tree` returns them: strictly increasing from 0.
        length: ``[B]`` int32 visited nodes per row, 0 for a row to leave alone.
        start: ``[B]`` int64 (or int32) slot of tree node 0 in that row.

    Raises:
        ValueError: naming the argument, for a wrong shape, dtype or device, memory shared within a kv tensor
            (``expand``), or a kv tensor that requires grad unless gradients are off; and, on the CPU, for a
            length beyond K, or a path that does not increase or leaves the cache (nothing is moved then). On
            a GPU such moves are left out instead.

    Source: the cache update of tree decoding, Miao et al., "SpecInfer", ASPLOS 2024, section 4.
    """
    kv = list(kv)
    if torch.is_grad_enabled():
        for i, t in enumerate(kv):
            if getattr(t, "requires_grad", False):
                raise ValueError(f"kv[{i}] must not require grad: it is changed in place (torch.no_grad())")
    _op(kv, path, length, start.to(torch.int64) if start.dtype == torch.int32 else start)
