"""Contract of ``verify_tree_rejection``: sampled drafts are accepted by rejection sampling, exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specfuse.kernels import tuned
from specfuse.kernels.verify_tree_rejection_ref import verify_tree_rejection_ref
from specfuse.ops import native
from specfuse.ops.verify_tree import AcceptedPath, check_inputs, check_values, empty_outputs, per_row_tensors

if TYPE_CHECKING:
    from specfuse.tree import TokenTree

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # codes of csrc/verify_tree.h

torch.library.define(
    "specfuse::verify_tree_rejection",
    "(Tensor logits, Tensor draft_probs, Tensor? draft_ids, bool with_replacement, Tensor tokens, "
    "Tensor parents, Tensor num_nodes, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
    "Tensor seed, Tensor positions) -> (Tensor, Tensor, Tensor, Tensor)",
)
_op = torch.ops.specfuse.verify_tree_rejection.default
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _check(logits: Tensor, draft_probs: Tensor, draft_ids: Tensor | None, *args: Tensor) -> None:
    check_inputs(logits, *args)
    B, N, V = logits.shape
    given = f"{list(draft_probs.shape)} {draft_probs.dtype} on {draft_probs.device}"
    wanted = f"[{B}, {N}, {V if draft_ids is None else 'k'}]"
    if draft_probs.dtype not in _DTYPES or draft_probs.device != logits.device or draft_probs.dim() != 3:
        raise ValueError(
            f"draft_probs must be {wanted} float32, float16 or bfloat16 on {logits.device}, got {given}"
        )
    if draft_probs.shape[:2] != (B, N) or (draft_ids is None and draft_probs.shape[2] != V):
        hint = "" if draft_ids is not None else " (without draft_ids)"
        raise ValueError(f"draft_probs must be {wanted}{hint}, got {given}")
    if draft_ids is None:
        return
    ids = draft_ids
    if ids.shape != draft_probs.shape or ids.dtype != torch.int64 or ids.device != logits.device:
        raise ValueError(
            f"draft_ids must be {list(draft_probs.shape)} torch.int64 on {logits.device} as draft_probs is, "
            f"got {list(ids.shape)} {ids.dtype} on {ids.device}"
        )


@torch.library.register_fake("specfuse::verify_tree_rejection")
def _fake(
    logits: Tensor, draft_probs: Tensor, draft_ids: Tensor | None, with_replacement: bool, *args: Tensor
) -> _Outputs:
    _check(logits, draft_probs, draft_ids, *args)
    return empty_outputs(logits)


def _reference(
    logits: Tensor, draft_probs: Tensor, draft_ids: Tensor | None, with_replacement: bool, *args: Tensor
) -> _Outputs:
    _check(logits, draft_probs, draft_ids, *args)
    check_values(logits.shape[1], *args[2:])
    return verify_tree_rejection_ref(logits, draft_probs, draft_ids, with_replacement, *args)


torch.library.impl("specfuse::verify_tree_rejection", "default", _reference)


def _native_call(
    logits: Tensor, draft_probs: Tensor, draft_ids: Tensor | None, with_replacement: bool, *args: Tensor
) -> tuple:
    """Arguments of the native functions (csrc/bindings_cpu.cpp), the outputs, and what must stay alive."""
    _check(logits, draft_probs, draft_ids, *args)
    inputs = [t.contiguous() for t in args]
    ids = None if draft_ids is None else draft_ids.contiguous()
    outputs = empty_outputs(logits)
    tree = (
        logits.data_ptr(),
        _DTYPES[logits.dtype],
        logits.shape,
        logits.stride(),
        [t.data_ptr() for t in inputs],
        [t.data_ptr() for t in outputs],
    )
    drafts = (
        draft_probs.data_ptr(),
        _DTYPES[draft_probs.dtype],
        draft_probs.shape[2],
        draft_probs.stride(),
        0 if ids is None else ids.data_ptr(),
        ids is not None,
        with_replacement,
    )
    return (*tree, *drafts), outputs, (inputs, ids)


if native.cpu is not None:

    @torch.library.impl("specfuse::verify_tree_rejection", "cpu")
    def _cpu(*args: Any) -> _Outputs:
        call, outputs, _inputs = _native_call(*args)
        native.cpu.verify_tree_rejection(*call, torch.get_num_threads())
        return outputs


def _cluster(logits: Tensor) -> int:
    """Blocks that share the rows of a tree."""
    if torch.cuda.get_device_capability(logits.device) < (9, 0):  # no clusters of blocks before
        return 1
    B, _, V = logits.shape
    return tuned.config("verify_tree_rejection", {"B": B, "V": V}, logits.device)["cluster"]


if native.cuda is not None:

    @torch.library.impl("specfuse::verify_tree_rejection", "cuda")
    def _cuda(*args: Any) -> _Outputs:
        call, outputs, _inputs = _native_call(*args)
        logits, cluster = args[0], _cluster(args[0])
        size = native.cuda.verify_tree_rejection_scratch_bytes(logits.shape[0], cluster)
        scratch = logits.new_empty(size, dtype=torch.uint8)  # of this call alone, also in a graph
        with torch.cuda.device(logits.device):
            stream = torch.cuda.current_stream().cuda_stream
            native.cuda.verify_tree_rejection(*call, cluster, scratch.data_ptr(), stream)
        return outputs


def verify_tree_rejection(
    logits: Tensor,
    tree: TokenTree,
    draft_probs: Tensor,
    *,
    draft_ids: Tensor | None = None,
    with_replacement: bool = False,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    positions: int | Tensor | None = None,
) -> AcceptedPath:
    """Verify drafts that were drawn at random, accepting as many as the drafter's probabilities allow.

    The children of node i, in the order of their indices, were drawn from ``q = draft_probs[b, i]``; p is
    the target's distribution after node i behind temperature and filters. Equivalent, at one node, to::

        for child, u in zip(children(node), coins):
            if u * q[token(child)] < p[token(child)]:  # with probability min(1, p / q)
                return child
            p = normalised((p - q).clamp_min(0))
            if not with_replacement:
                q = normalised(q without token(child))
        emit a token drawn from p

    What is emitted has exactly the target's distribution, on condition that the drafts are honest: each
    drawn from its q, given its path and earlier siblings, with noise that has nothing to do with this op's
    (a drafter may use the noise of :func:`verify_tree` under the same seed; this op's coins and draws have
    streams of their own). How many children a node has may depend on q and on earlier draws, not on later
    ones; their order is the order of the draws. Unlike with :func:`verify_tree`, tokens depend on the drafts.

    Args:
        logits: ``[B, N, V]`` float32, float16 or bfloat16, any strides, as for :func:`verify_tree`. A row
            without a distribution ends the walk with ``next_token`` -1 and log-probability NaN.
        tree: the drafted tokens, N nodes wide (at most 1024). Padding after ``num_nodes`` is never read.
        draft_probs: q, divided by its sum where it is used. ``[B, N, V]``, or ``[B, N, k]`` together with
            ``draft_ids``; float32, float16 or bfloat16, any strides. Row i holds what the *children* of node
            i were drawn from; rows of leaves are never read. A visited row with a negative, infinite or NaN
            entry is treated like one without a target distribution.
        draft_ids: ``[B, N, k]`` int64 ids of the tokens that ``draft_probs`` speaks of, unique within a row;
            all others have q = 0. Ids outside ``[0, V)`` (-1, say) are padding.
        with_replacement: siblings were drawn independently, repeats included. The default is that each was
            drawn from what its elder siblings left of q; it is exact for independent draws too, but accepts
            a little less of them. The other way round is not exact.
        temperature: 0 makes p the one-hot argmax: the walk and the log-probabilities of :func:`verify_tree`,
            ``draft_probs`` are not read. Number or ``[B]``, as all that follow.
        top_k: keep the k largest logits and their ties; 0 keeps all.
        top_p: then keep a token if the mass strictly before it is below ``top_p``; 1 keeps all.
        min_p: then keep tokens of at least ``min_p`` times the largest probability; 0 keeps all.
        seed: an integer s gives row b the seed ``s + b`` (mod 2**64); a tensor is used as it is.
        positions: absolute position of each root; None means 0. Noise is keyed by (seed, position of the
            emitted token) and by the child's ordinal or the token.

    Returns:
        An :class:`AcceptedPath`; log-probabilities are those of p, before any draft was rejected. A child
        whose token has q = 0 (or none left, the second of two equal siblings drawn without replacement) was
        not drawn from q: it is passed over, and accepted only if the emitted token is its own, which keeps
        the result exact. Probabilities are realised to 2**-24, the resolution of a coin.

    Raises:
        ValueError: naming the argument and its value, for a wrong shape, dtype, device or range. Values in
            tensors on a GPU are not checked, since that would wait for the device.

    Source: Leviathan et al., "Fast inference from transformers via speculative decoding", ICML 2023, and
        Chen et al., 2023 (a chain); Miao et al., "SpecInfer", ASPLOS 2024, section 4.3 (several siblings);
        Chen et al., "Sequoia", 2024, and Jeon et al., "Recursive speculative decoding", 2024 (without
        replacement).
    """
    if logits.dim() != 3:
        raise ValueError(f"logits must be [B, N, V], got {list(logits.shape)}")
    rows = per_row_tensors(logits, temperature, top_k, top_p, min_p, seed, positions)
    outputs = _op(
        (logits.float() if logits.dtype == torch.float64 else logits).detach(),
        (draft_probs.float() if draft_probs.dtype == torch.float64 else draft_probs).detach(),
        draft_ids,
        with_replacement,
        tree.tokens,
        tree.parents,
        tree.num_nodes,
        *rows,
    )
    return AcceptedPath(*outputs)
