"""Contract of ``tree_attention``: the nodes of draft trees attend to the KV cache and to their ancestors."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from specfuse.kernels.tree_attention_eager import TreeInputs, load_flash_package, prefix_and_tree, sdpa

if importlib.util.find_spec("triton") is not None:
    from specfuse.kernels import tree_attention as _triton
else:
    _triton = None  # type: ignore[assignment]

torch.library.define(
    "specfuse::tree_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor ancestors, Tensor? k_tree, "
    "Tensor? v_tree, Tensor? starts, float scale, SymInt tail, SymInt longest, str implementation) -> Tensor",
)
_op = torch.ops.specfuse.tree_attention.default

MAX_NODES = 64
IMPLEMENTATIONS = ("auto", "triton", "flash", "torch", "sdpa")
_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALF, torch.float32, torch.float64)


def _check(x: TreeInputs, implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    _check_rank(x.q, x.k_cache)
    B, H, N, D = x.q.shape
    G, slots = x.k_cache.shape[1:3]
    if not 1 <= N <= MAX_NODES or not 1 <= x.tail <= MAX_NODES:
        raise ValueError(
            f"q and tail: a tree may have 1 to {MAX_NODES} nodes (ancestor bits are one 64-bit word), "
            f"got N = {N}, tail = {x.tail}"
        )
    if G == 0 or H % G:
        raise ValueError(f"q has {H} heads, which must be a multiple of the {G} heads of k_cache")
    if (x.k_tree is None) != (x.v_tree is None):
        raise ValueError("k_tree and v_tree must be given together")
    for name, t, shape in (
        ("k_cache", x.k_cache, (B, G, slots, D)),
        ("v_cache", x.v_cache, (B, G, slots, D)),
        ("k_tree", x.k_tree, (B, G, x.tail, D)),
        ("v_tree", x.v_tree, (B, G, x.tail, D)),
    ):
        if t is None:
            continue
        if t.shape != shape or t.dtype != x.q.dtype or t.device != x.q.device:
            raise ValueError(f"{name} must be {list(shape)} {x.q.dtype} on {x.q.device}, got {_describe(t)}")
        if t.stride(3) != 1 and D > 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {t.stride()}")
    for name, t, size in (
        ("lengths", x.lengths, [B]),
        ("ancestors", x.ancestors, [B, N]),
        ("starts", x.starts, [B]),
    ):
        if t is not None and ([*t.shape] != size or t.dtype != torch.int64 or t.device != x.q.device):
            raise ValueError(f"{name} must be {size} int64 on {x.q.device}, got {_describe(t)}")


def _check_rank(q: Tensor, k_cache: Tensor) -> None:
    if q.dim() != 4 or q.dtype not in _DTYPES or q.shape[3] == 0:
        wanted = "[B, H, N, D] float16, bfloat16, float32 or float64 with D >= 1"
        raise ValueError(f"q must be {wanted}, got {_describe(q)}")
    if k_cache.dim() != 4:
        raise ValueError(f"k_cache must be [B, G, Smax, D], got {_describe(k_cache)}")


def _describe(t: Tensor) -> str:
    return f"{list(t.shape)} {t.dtype} on {t.device}"


def _empty_output(q: Tensor) -> Tensor:
    """Heads beside D in memory: what follows attention reads ``[B, N, H * D]`` without a copy."""
    B, H, N, D = q.shape
    return q.new_empty((B, N, H, D)).transpose(1, 2)


@torch.library.register_fake("specfuse::tree_attention")
def _fake(q: Tensor, *args: object) -> Tensor:
    _check(TreeInputs(q, *args[:-1]), args[-1])  # type: ignore[arg-type]
    return _empty_output(q)


def _eager(q: Tensor, *args: object) -> Tensor:
    x, implementation = TreeInputs(q, *args[:-1]), args[-1]  # type: ignore[arg-type]
    _check(x, implementation)  # type: ignore[arg-type]
    if implementation == "triton":
        return _run_triton(x)
    if implementation in ("auto", "sdpa"):
        result = sdpa(x)
    else:
        result = prefix_and_tree(x, flash=implementation == "flash")
    return _empty_output(q).copy_(result)


torch.library.impl("specfuse::tree_attention", "default", _eager)


def _run_triton(x: TreeInputs) -> Tensor:
    if _triton is None:
        raise RuntimeError(
            "implementation='triton' needs Triton, which comes with the CUDA builds of PyTorch"
        )
    if x.q.device.type != "cuda":
        raise ValueError(f"implementation='triton' needs tensors on a GPU, got q on {x.q.device}")
    if x.q.dtype not in (*_HALF, torch.float32) or x.q.shape[3] > 128:
        raise ValueError(
            f"implementation='triton' takes float16, bfloat16 or float32 and D <= 128, got {_describe(x.q)}"
        )
    out = _empty_output(x.q)
    if not out.numel():
        return out
    q = x.q if x.q.stride(3) == 1 else x.q.contiguous()
    x = x._replace(q=q, ancestors=x.ancestors.contiguous(), lengths=x.lengths.contiguous())
    if x.starts is not None:
        x = x._replace(starts=x.starts.contiguous())
    with torch.cuda.device(q.device):
        return _triton.tree_attention(*x, out)


def beats_dense_mask(q_dtype: torch.dtype, D: int, device: torch.device) -> bool:
    """Whether "auto" has something better there than a dense mask over copies of the cache."""
    if device.type == "cpu":
        return True
    return _triton is not None and device.type == "cuda" and q_dtype in _HALF and D <= 128


if _triton is not None:

    @torch.library.impl("specfuse::tree_attention", "cuda")
    def _cuda(q: Tensor, *args: object) -> Tensor:
        x, implementation = TreeInputs(q, *args[:-1]), args[-1]  # type: ignore[arg-type]
        if implementation != "auto" or not beats_dense_mask(q.dtype, q.shape[-1], q.device):
            return _eager(q, *args)
        _check(x, "auto")
        return _run_triton(x)


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    ancestors: Tensor,
    *,
    k_tree: Tensor | None = None,
    v_tree: Tensor | None = None,
    starts: Tensor | None = None,
    scale: float | None = None,
    tail: int | None = None,
    longest: int | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Softmax attention of tree nodes to the committed prefix and to their own ancestors. Forward only.

    Equivalent to ``scaled_dot_product_attention(q, k, v, attn_mask=mask)`` over the cache followed by the
    tree, where ``mask[b, 0, i]`` is True at slots ``starts[b] <= s < lengths[b]`` and at tail slot j where
    bit j of ``ancestors[b, i]`` is set. A node that sees nothing gets zeros. No other slot is read, so it may
    hold anything, NaN included.

    Args:
        q: ``[B, H, N, D]`` queries of the nodes, N at most 64.
        k_cache: ``[B, G, Smax, D]``, H a multiple of G. Any strides as long as D is contiguous.
        v_cache: as ``k_cache``.
        lengths: ``[B]`` int64 (or int32) committed slots per row, padding included.
        ancestors: ``[B, N]`` int64 (or uint64, as :meth:`TokenTree.ancestor_bits` gives them): bit j of node
            i says that i sees tail slot j; a node usually sees itself. 0 for padding.
        k_tree: ``[B, G, T, D]`` keys of the tail; None: the tail lies in the cache from slot ``lengths[b]``.
        v_tree: as ``k_tree``.
        starts: ``[B]`` int64 (or int32) first valid slot of each row (left padding); None means 0.
        scale: factor of the scores; None means ``D ** -0.5``.
        tail: T, slots of the tail that bits may name, at most 64. None means that of ``k_tree``, else N. More
            than N where earlier nodes of the tree already lie in the cache.
        longest: an upper bound of ``lengths`` known on the host, to choose the launch by; None means Smax.
        implementation: "auto" ("triton" for float16 and bfloat16 on a GPU, else "sdpa"), "triton",
            "flash" (the flash-attn package for the prefix), "torch" (PyTorch's flash attention for the
            prefix; waits for the GPU), "sdpa" (a dense mask: the reference).

    Returns:
        ``[B, H, N, D]`` in q's dtype, laid out so that ``transpose(1, 2)`` is contiguous.

    Raises:
        ValueError: naming the argument, for a wrong shape, dtype or device, and more than 64 nodes. Values of
            lengths and starts are checked on the CPU only; on a GPU they must fit the cache.
            Inputs that require grad, unless gradients are off.
        ImportError: "flash" without flash-attn 2. RuntimeError: "triton" without Triton.

    Source: Miao et al., "SpecInfer", ASPLOS 2024, section 4.2 (tree-based parallel decoding); Dao et al.,
        "Flash-Decoding for long-context inference", 2023 (splits of the prefix).
    """
    _check_rank(q, k_cache)
    if torch.is_grad_enabled():
        inputs = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k_tree": k_tree, "v_tree": v_tree}
        for name, t in inputs.items():
            if t is not None and t.requires_grad:
                raise ValueError(
                    f"{name} must not require grad: tree_attention is forward only (torch.no_grad()); train "
                    "with scaled_dot_product_attention"
                )
    if implementation == "flash":
        load_flash_package()
    if tail is None:
        tail = k_tree.shape[2] if k_tree is not None and k_tree.dim() == 4 else q.shape[2]
    bits = ancestors.view(torch.int64) if ancestors.dtype == torch.uint64 else ancestors
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    longest = k_cache.shape[2] if longest is None else longest
    lengths, starts = _as_int64(lengths), None if starts is None else _as_int64(starts)
    return _op(
        *(q, k_cache, v_cache, lengths, bits, k_tree, v_tree, starts, scale, tail, longest, implementation)
    )


def _as_int64(t: Tensor) -> Tensor:
    return t.to(torch.int64) if t.dtype == torch.int32 else t
