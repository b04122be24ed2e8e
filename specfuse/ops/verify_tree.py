"""Contract of ``verify_tree``: which drafted tokens survive, and the token that follows them."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from specfuse.kernels import tuned
from specfuse.kernels.verify_tree_ref import verify_tree_ref
from specfuse.ops import native

if TYPE_CHECKING:
    from specfuse.tree import TokenTree

MAX_NODES = 1024
_LOGITS_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # codes of csrc/verify_tree.h

_PER_ROW = {  # [B] tensors of the schema, in its order
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
    "positions": torch.int64,
}

torch.library.define(
    "specfuse::verify_tree",
    "(Tensor logits, Tensor tokens, Tensor parents, Tensor num_nodes, Tensor temperature, Tensor top_k, "
    "Tensor top_p, Tensor min_p, Tensor seed, Tensor positions) -> (Tensor, Tensor, Tensor, Tensor)",
)
_op = torch.ops.specfuse.verify_tree.default


class AcceptedPath(NamedTuple):
    """What a tree's target pass emits: one token per visited node."""

    path: Tensor  # [B, N] int32 visited nodes, path[:, 0] = 0 (the root), padded with -1
    length: Tensor  # [B] int32 visited nodes = emitted tokens = accepted drafts + 1; 0 where num_nodes is 0
    next_token: Tensor  # [B] int64 token emitted at the last visited node; -1 where there is no distribution
    logprobs: Tensor  # [B, N] float32 log-probability of the token emitted at path[b, i], padded with 0


def check_inputs(
    logits: Tensor, tokens: Tensor, parents: Tensor, num_nodes: Tensor, *per_row: Tensor
) -> None:
    """Raises ValueError for a wrong shape, dtype or device of the schema's tensors."""
    if logits.dim() != 3 or logits.dtype not in _LOGITS_DTYPES:
        raise ValueError(f"logits must be [B, N, V] float32, float16 or bfloat16, got {_describe(logits)}")
    B, N, V = logits.shape
    if N > MAX_NODES or V < 1:
        raise ValueError(f"logits must have at most {MAX_NODES} nodes and a token, got {_describe(logits)}")
    expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]]
    expected = [("tokens", tokens, (B, N), torch.int64), ("parents", parents, (B, N), torch.int32)]
    expected.append(("num_nodes", num_nodes, (B,), torch.int32))
    expected += [(name, t, (B,), _PER_ROW[name]) for name, t in zip(_PER_ROW, per_row, strict=True)]
    for name, t, shape, dtype in expected:
        if t.shape != shape or t.dtype != dtype or t.device != logits.device:
            raise ValueError(f"{name} must be {list(shape)} {dtype} on {logits.device}, got {_describe(t)}")


_RULES = {
    "temperature": (lambda v: 0.0 <= v < math.inf, "must be finite and not negative"),
    "top_k": (lambda v: v >= 0, "must not be negative"),
    "top_p": (lambda v: 0.0 < v <= 1.0, "must lie in (0, 1]"),
    "min_p": (lambda v: 0.0 <= v <= 1.0, "must lie in [0, 1]"),
}


def _describe(t: Tensor) -> str:
    return f"{list(t.shape)} {t.dtype} on {t.device}"


def _check_value(name: str, value: float) -> None:
    if name in _RULES and not _RULES[name][0](value):
        raise ValueError(f"{name} {_RULES[name][1]}, got {value}")


@torch.library.register_fake("specfuse::verify_tree")
def _fake(logits: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_inputs(logits, *args)
    return empty_outputs(logits)


def empty_outputs(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of an :class:`AcceptedPath`, not filled in."""
    B, N, _ = logits.shape
    return (
        logits.new_empty((B, N), dtype=torch.int32),
        logits.new_empty((B,), dtype=torch.int32),
        logits.new_empty((B,), dtype=torch.int64),
        logits.new_empty((B, N), dtype=torch.float32),
    )


def check_values(width: int, num_nodes: Tensor, *per_row: Tensor) -> None:
    """The checks of csrc/verify_tree_cpu.cpp, in its words; ``width`` is N."""
    for name, values in zip(_PER_ROW, per_row, strict=True):
        for value in values.tolist():
            _check_value(name, value)
    for n in num_nodes.tolist():
        if not 0 <= n <= width:
            raise ValueError(f"num_nodes must lie between 0 and the tree's width {width}, got {n}")


def _reference(logits: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_inputs(logits, *args)
    check_values(logits.shape[1], *args[2:])
    return verify_tree_ref(logits, *args)


torch.library.impl("specfuse::verify_tree", "default", _reference)


def _native_call(logits: Tensor, args: tuple[Tensor, ...]) -> tuple:
    """Arguments of the native functions (csrc/bindings_cpu.cpp), the outputs, and what must stay alive."""
    check_inputs(logits, *args)
    inputs = [t.contiguous() for t in args]
    outputs = empty_outputs(logits)
    call = (
        logits.data_ptr(),
        _LOGITS_DTYPES[logits.dtype],
        logits.shape,
        logits.stride(),
        [t.data_ptr() for t in inputs],
        [t.data_ptr() for t in outputs],
    )
    return call, outputs, inputs


if native.cpu is not None:

    @torch.library.impl("specfuse::verify_tree", "cpu")
    def _cpu(logits: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        call, outputs, _inputs = _native_call(logits, args)
        native.cpu.verify_tree(*call, torch.get_num_threads())
        return outputs


def _strategy(logits: Tensor) -> tuple[int, int]:
    """Blocks per row of a scan of all rows (0: rows are read when visited) and per tree of the walk."""
    B, N, V = logits.shape
    config = tuned.config("verify_tree", {"rows": B * N, "V": V, "B": B}, logits.device)
    # Clusters of blocks begin with compute capability 9.0.
    return config["splits"], config["cluster"] if _has_clusters(logits.device) else 1


@lru_cache
def _has_clusters(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _scratch(module: Any, logits: Tensor, splits: int, cluster: int) -> Tensor:
    """Memory of this call alone: calls on other streams, or replays of a graph, do not share it."""
    size = module.verify_tree_scratch_bytes(*logits.shape[:2], splits, cluster)
    return logits.new_empty(size, dtype=torch.uint8)


if native.cuda is not None:

    @torch.library.impl("specfuse::verify_tree", "cuda")
    def _cuda(logits: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        call, outputs, _inputs = _native_call(logits, args)
        splits, cluster = _strategy(logits)
        scratch = _scratch(native.cuda, logits, splits, cluster)
        with torch.cuda.device(logits.device):
            stream = torch.cuda.current_stream().cuda_stream
            native.cuda.verify_tree(*call, splits, cluster, scratch.data_ptr(), stream)
        return outputs


def _per_row(name: str, value: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` as a [B] tensor beside ``like`` [B, N, V]; numbers are checked here, tensors by the op."""
    if isinstance(value, Tensor):
        if value.shape not in ((), (1,), like.shape[:1]):
            raise ValueError(f"{name} must be a number or [{like.shape[0]}], got {list(value.shape)}")
        if name == "top_k" and value.dtype != dtype:
            value = value.clamp(max=2**31 - 1)
        return value.to(device=like.device, dtype=dtype).expand(like.shape[0])
    if not isinstance(value, (int, float) if dtype.is_floating_point else int):
        raise ValueError(f"{name} must be a number or a tensor, got {value!r}")
    filled = _filled
    # On a GPU a tensor must not outlive the stream or the capture that fills it; a tracer's is none at all.
    if like.is_cpu and type(like) is Tensor and not torch.compiler.is_compiling():
        filled = _kept_filled
    return filled(name, value, like.shape[0], dtype, like.device)


def _filled(name: str, value: float, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B] times a checked number; a seed grows by one from row to row."""
    _check_value(name, value)
    if name == "temperature" and 0.0 < value < torch.finfo(torch.float32).tiny:
        raise ValueError(f"temperature must be 0 (greedy) or a normal float32, got {value}")
    if not dtype.is_floating_point:
        # Seeds wrap to 64 bits; any top_k beyond the vocabulary is the same as the vocabulary.
        value = min(value, 2**31 - 1) if name == "top_k" else (int(value) + 2**63) % 2**64 - 2**63
    filled = torch.full((batch,), value, dtype=dtype, device=device)
    return filled + torch.arange(batch, device=device) if name == "seed" else filled


# The same few numbers come with every call, and nothing writes to what is made of them.
_kept_filled = lru_cache(maxsize=128)(_filled)


def per_row_tensors(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    seed: int | Tensor,
    positions: int | Tensor | None,
) -> list[Tensor]:
    """The [B] tensors of the schema from what a caller may give for them."""
    return [
        _per_row("temperature", temperature, logits, torch.float32),
        _per_row("top_k", top_k, logits, torch.int32),
        _per_row("top_p", top_p, logits, torch.float32),
        _per_row("min_p", min_p, logits, torch.float32),
        _per_row("seed", seed, logits, torch.int64),
        _per_row("positions", 0 if positions is None else positions, logits, torch.int64),
    ]


def verify_tree(
    logits: Tensor,
    tree: TokenTree,
    *,
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    positions: int | Tensor | None = None,
) -> AcceptedPath:
    """Walk each row's draft tree: emit one token per visited node and descend into the child that holds it.

    The token emitted at a node is ``argmax(filter(logits / temperature) + gumbel(seed, position, token))``, a
    draw from the target's own filtered distribution, or ``argmax(logits)`` where the temperature is 0 (ties
    go to the lowest id). What is emitted never depends on the drafts, so the result is exact for any drafter,
    any number of siblings, and equals sampling token by token with the same seed. Equivalent, for one row,
    to::

        node = 0
        while node is not None:
            token = emit(logits[node], position=positions + depth(node) + 1)
            node = next((c for c in children(node) if tree.tokens[c] == token), None)

    Args:
        logits: ``[B, N, V]`` float32, float16 or bfloat16, any strides; ``logits[b, i]`` is the target's
            prediction after node i. float64 is rounded to float32, as transformers' generate does. -inf marks
            an impossible token. A row with NaN, with only -inf, or (sampling) with +inf has no distribution:
            the walk ends there with ``next_token`` -1 and log-probability NaN.
        tree: the drafted tokens, N nodes wide (at most 1024). Padding after ``num_nodes`` is never read.
        temperature: 0 for greedy decoding, which ignores the filters. Number or ``[B]``, as all that follow.
        top_k: keep the k largest logits and their ties; 0 keeps all.
        top_p: then keep a token if the mass strictly before it, in (probability descending, id ascending)
            order, is below ``top_p``; 1 keeps all.
        min_p: then keep tokens of at least ``min_p`` times the largest probability; 0 keeps all.
        seed: an integer s gives row b the seed ``s + b`` (mod 2**64); a tensor is used as it is.
        positions: absolute position of each root in its own sequence, padding not counted; None means 0. The
            token emitted at depth d has position ``positions + d + 1``.

    Returns:
        An :class:`AcceptedPath`. Log-probabilities are those of the filtered distribution at this
        temperature, for greedy rows those of the unfiltered one at temperature 1.

    Raises:
        ValueError: naming the argument and its value, for a wrong shape, dtype, device or range. Values in
            tensors on a GPU are not checked, since that would wait for the device.

    Source: Gumbel-max sampling, e.g. Maddison, Tarlow, Minka, "A* sampling", NeurIPS 2014; noise from
        Philox-4x32-10.
    """
    if logits.dtype == torch.float64:
        logits = logits.float()
    if logits.dim() != 3:
        raise ValueError(f"logits must be [B, N, V], got {_describe(logits)}")
    outputs = _op(
        logits.detach(),
        tree.tokens,
        tree.parents,
        tree.num_nodes,
        *per_row_tensors(logits, temperature, top_k, top_p, min_p, seed, positions),
    )
    return AcceptedPath(*outputs)
