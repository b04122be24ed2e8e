"""Definition of ``compact_kv``: keep the accepted path of a tree in the KV cache."""

from __future__ import annotations

from torch import Tensor


def compact_kv_ref(kv: list[Tensor], path: Tensor, length: Tensor, start: Tensor) -> None:
    """Move slot ``start + path[b, i]`` to ``start + i`` for ``1 <= i < length[b]``, in every tensor.

    Shapes and meaning are those of :func:`specfuse.ops.compact_kv`, which calls this where no native code is
    built.
    """
    for b, (n, first) in enumerate(zip(length.tolist(), start.tolist(), strict=True)):
        source = first + path[b, 1:n].long()
        for cache in kv:
            # Indexing copies before it writes, so source and destination may overlap.
            cache[b, :, first + 1 : first + n] = cache[b, :, source]
