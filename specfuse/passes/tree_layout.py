"""What a step asks about its trees, in native code where it was built: a microsecond or two per question.

The same questions are answered in Python by :class:`TokenTree` and the drafters' guard, which define the
answers.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from specfuse.ops import native
from specfuse.tree import TokenTree, pack_bits

UNBOUNDED = 2**62
"""A position or a vocabulary that nothing reaches."""


def is_plain(tree: TokenTree) -> bool:
    """Whether native code can read the tree: the layout's dtypes and shapes, on the CPU, without gaps."""
    tokens, parents, num_nodes = tree.tokens, tree.parents, tree.num_nodes
    shape = tokens.shape
    return (
        native.step is not None
        and len(shape) == 2
        and parents.shape == shape
        and num_nodes.shape == shape[:1]
        and tokens.dtype is torch.int64
        and parents.dtype is torch.int32
        and num_nodes.dtype is torch.int32
        and tokens.is_cpu
        and parents.is_cpu
        and num_nodes.is_cpu
        and tokens.is_contiguous()
        and parents.is_contiguous()
        and num_nodes.is_contiguous()
    )


def is_sound(tree: TokenTree) -> bool:
    """True where ``tree.validate()`` accepts the trees; False where it does not, or must be asked."""
    if tree.probs is not None and (
        tree.probs.dtype is not torch.float32 or tree.probs.shape != tree.tokens.shape
    ):
        return False
    return is_plain(tree) and native.step.sound_trees(
        tree.tokens.data_ptr(), tree.parents.data_ptr(), tree.num_nodes.data_ptr(), *tree.tokens.shape
    )


def holds_foreign_tokens(tree: TokenTree, limit: int | None, refused: Collection[int]) -> bool:
    """Whether a drafted node's token lies outside ``[0, limit)`` or in ``refused``."""
    limit = UNBOUNDED if limit is None else limit
    if is_plain(tree):
        return native.step.foreign_tokens(tree.tokens.data_ptr(), *tree.tokens.shape, limit, list(refused))
    drafts = tree.tokens[:, 1:]
    foreign = (drafts < 0) | (drafts >= limit)
    for token in refused:
        foreign |= drafts == token
    return bool(foreign.any())


def node_positions(
    tree: TokenTree, roots: Tensor, largest: int | None = None, out: Tensor | None = None
) -> Tensor:
    """``[B, N]`` int64 position ids: the roots' ``[B]`` plus depth, none above ``largest``."""
    if not is_plain(tree) or not roots.is_cpu or roots.shape != tree.num_nodes.shape:
        positions = tree.positions(roots)
        positions = positions if largest is None else positions.clamp(max=largest)
        return positions if out is None else out.copy_(positions)
    roots = roots.to(torch.int64).contiguous()
    if out is None:
        out = torch.empty_like(tree.tokens)
    native.step.node_positions(
        tree.parents.data_ptr(),
        tree.num_nodes.data_ptr(),
        *tree.tokens.shape,
        roots.data_ptr(),
        UNBOUNDED if largest is None else largest,
        out.data_ptr(),
    )
    return out


def ancestor_bits(tree: TokenTree, out: Tensor | None = None) -> Tensor:
    """``[B, N]`` int64 ancestor bits of ``N <= 64`` nodes, on the CPU; padding sees itself alone."""
    if not is_plain(tree):
        bits = pack_bits(tree.ancestor_mask()).cpu()
        return bits if out is None else out.copy_(bits)
    if out is None:
        out = torch.empty_like(tree.tokens)
    native.step.ancestor_bits(
        tree.parents.data_ptr(), tree.num_nodes.data_ptr(), *tree.tokens.shape, out.data_ptr()
    )
    return out
