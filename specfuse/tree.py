"""TokenTree: the drafted tokens of a batch as flat trees, and the conversions around it.

Pure data: imports nothing of specfuse. Node 0 is the root, the last committed token; its children are drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class SGLangTree(NamedTuple):
    """The first-child / next-sibling encoding used by SGLang's tree verification kernels."""

    retrieve_index: Tensor  # [B, N] int64 row of the node in the flattened batch (b * N + i), -1 padded
    next_token: Tensor  # [B, N] int64 first child, -1 where there is none
    next_sibling: Tensor  # [B, N] int64 next child of the same parent, -1 where there is none


class TokenTree(NamedTuple):
    """A batch of token trees, stored flat, parents before children.

    Args:
        tokens: ``[B, N]`` int64 token ids; ``tokens[:, 0]`` is the root. Anything after ``num_nodes`` is
            padding.
        parents: ``[B, N]`` int32 index of each node's parent, smaller than the node's own; -1 at the root.
        num_nodes: ``[B]`` int32 nodes in each tree, root included; 0 for a row that takes no part.
        probs: ``[B, N]`` float32, the drafter's probability that the node is reached (1 at the root), or
            None.
    """

    tokens: Tensor
    parents: Tensor
    num_nodes: Tensor
    probs: Tensor | None = None

    def rows(self, rows: list[int] | slice) -> TokenTree:
        """Some of the batch's trees, probabilities included."""
        probs = None if self.probs is None else self.probs[rows]
        return TokenTree(self.tokens[rows], self.parents[rows], self.num_nodes[rows], probs)

    # ---------------------------------------------------------------- building

    @classmethod
    def from_parents(
        cls,
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
        probs: Sequence[Sequence[float]] | None = None,
    ) -> TokenTree:
        """Trees from one list of tokens and one list of parent indices per row, padded to the longest row."""
        num_nodes = [len(row) for row in tokens]
        for b, (row, parent_row) in enumerate(zip(tokens, parents, strict=True)):
            if len(row) != len(parent_row):
                raise ValueError(f"row {b}: {len(parent_row)} parents for {len(row)} tokens")
        width = max(num_nodes, default=0)
        padded_tokens = [[*row, *[0] * (width - len(row))] for row in tokens]
        padded_parents = [[*row, *[-1] * (width - len(row))] for row in parents]
        shape = (len(num_nodes), width)
        padded_probs = None
        if probs is not None:
            padded_probs = torch.tensor(
                [[*row, *[0.0] * (width - len(row))] for row in probs], dtype=torch.float32
            ).reshape(shape)
        return cls(
            torch.tensor(padded_tokens, dtype=torch.int64).reshape(shape),
            torch.tensor(padded_parents, dtype=torch.int32).reshape(shape),
            torch.tensor(num_nodes, dtype=torch.int32),
            padded_probs,
        )

    @classmethod
    def from_chains(cls, roots: Sequence[int], chains: Sequence[Sequence[int]]) -> TokenTree:
        """One chain of drafted tokens behind each root: B token ids, B lists of token ids."""
        _same_length("chains", chains, roots)
        tokens = [[root, *chain] for root, chain in zip(roots, chains, strict=True)]
        return cls.from_parents(tokens, [list(range(-1, len(row) - 1)) for row in tokens])

    @classmethod
    def from_topk(cls, roots: Sequence[int], levels: Sequence[Tensor]) -> TokenTree:
        """A full top-k expansion: every node of level d has the same number of children in level d + 1.

        Args:
            roots: B root token ids.
            levels: for each depth d = 1, 2, ... an int64 tensor ``[B, n_{d-1}, k_d]``: the k_d children of
                each of the n_{d-1} nodes of the level above (n_0 = 1), in the order of that level.

        Raises:
            ValueError: if a level's shape does not follow from the one above, or siblings repeat a token.
        """
        columns, parents, above = [torch.tensor(list(roots)).reshape(-1, 1)], [-1], [0]
        for d, level in enumerate(levels, start=1):
            if level.dim() != 3 or tuple(level.shape[:2]) != (len(roots), len(above)):
                raise ValueError(
                    f"levels[{d - 1}] must be [B={len(roots)}, {len(above)}, k], got {tuple(level.shape)}"
                )
            columns.append(level.reshape(len(roots), -1).cpu())
            first, width = len(parents), level.shape[2]
            parents += [parent for parent in above for _ in range(width)]
            above = list(range(first, len(parents)))
        tokens = torch.cat(columns, dim=1).to(torch.int64)
        tree = cls(
            tokens,
            torch.tensor(parents, dtype=torch.int32).expand(len(roots), -1).contiguous(),
            torch.full((len(roots),), len(parents), dtype=torch.int32),
        )
        tree.validate()
        return tree

    @classmethod
    def from_sequences(
        cls,
        roots: Sequence[int],
        sequences: Sequence[Sequence[Sequence[int]]],
        max_nodes: int | None = None,
    ) -> TokenTree:
        """Several continuations per root, merged as a trie: shared prefixes become shared nodes.

        Args:
            roots: B root token ids.
            sequences: for each row, any number of token lists (earlier lists take the nodes first).
            max_nodes: at most this many drafted nodes per row (root excluded); None for no bound.
        """
        _same_length("sequences", sequences, roots)
        tokens: list[list[int]] = []
        parents: list[list[int]] = []
        for root, continuations in zip(roots, sequences, strict=True):
            row, row_parents = [root], [-1]
            children: dict[tuple[int, int], int] = {}
            for continuation in continuations:
                node = 0
                for token in continuation:
                    child = children.get((node, token))
                    if child is None:
                        if max_nodes is not None and len(row) > max_nodes:
                            break
                        child = children[node, token] = len(row)
                        row.append(token)
                        row_parents.append(node)
                    node = child
            tokens.append(row)
            parents.append(row_parents)
        return cls.from_parents(tokens, parents)

    @classmethod
    def from_sglang(
        cls, tokens: Tensor, next_token: Tensor, next_sibling: Tensor, num_nodes: Tensor | None = None
    ) -> TokenTree:
        """Trees from SGLang's first-child / next-sibling arrays, each ``[B, N]`` with -1 for "none".

        Node order is kept, so every child must stand behind its parent (SGLang builds them so).
        ``num_nodes [B]`` defaults to N for every row.
        """
        batch, width = tokens.shape
        counts = [width] * batch if num_nodes is None else num_nodes.tolist()
        parents = torch.full((batch, width), -1, dtype=torch.int32)
        for b, (first_child, sibling) in enumerate(
            zip(next_token.tolist(), next_sibling.tolist(), strict=True)
        ):
            for node in range(counts[b]):
                child, steps = first_child[node], 0
                while child != -1:
                    if not 0 <= child < width or steps > width:
                        raise ValueError(
                            f"row {b}: next_token / next_sibling of node {node} lead to {child} (cycle?)"
                        )
                    parents[b, child] = node
                    child, steps = sibling[child], steps + 1
        tree = cls(tokens.to(torch.int64).cpu(), parents, torch.tensor(counts, dtype=torch.int32))
        tree.validate()
        return tree

    # ---------------------------------------------------------------- reading

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    @property
    def width(self) -> int:
        """N, the padded number of nodes per row, root included."""
        return self.tokens.shape[1]

    def to(self, device: torch.device | str) -> TokenTree:
        """The same trees with every tensor on ``device``."""
        if self.tokens.device == torch.device(device):
            return self
        moved = [None if x is None else x.to(device, non_blocking=True) for x in self]
        return TokenTree(*moved)  # type: ignore[arg-type]

    def depths(self) -> Tensor:
        """``[B, N]`` int64 distance from the root; 0 in the padding."""
        depth = np.zeros(self.tokens.shape, dtype=np.int64)
        for row, parents, count in zip(depth, self.parents.tolist(), self.num_nodes.tolist(), strict=True):
            for node in range(1, count):
                row[node] = row[parents[node]] + 1
        return torch.from_numpy(depth).to(self.tokens.device)

    def positions(self, root_positions: Tensor) -> Tensor:
        """``[B, N]`` int64 absolute position of each node, given the roots' ``[B]``."""
        return self.depths() + root_positions.to(self.tokens.device, torch.int64)[:, None]

    def ancestor_mask(self) -> Tensor:
        """``[B, N, N]`` bool: ``mask[b, i, j]`` iff j is i or an ancestor of i. Padding sees only itself."""
        batch, width = self.tokens.shape
        mask = np.zeros((batch, width, width), dtype=np.bool_)
        for rows, parents, count in zip(mask, self.parents.tolist(), self.num_nodes.tolist(), strict=True):
            for node in range(1, count):
                rows[node] = rows[parents[node]]
                rows[node, node] = True
                if parents[node] == 0:
                    rows[node, 0] = True
            np.fill_diagonal(rows, True)
        return torch.from_numpy(mask).to(self.tokens.device)

    def ancestor_bits(self) -> Tensor:
        """``[B, N]`` uint64: bit j of ``bits[b, i]`` is ``ancestor_mask()[b, i, j]``. Needs N <= 64."""
        if self.width > 64:
            raise ValueError(f"ancestor_bits packs at most 64 nodes into a word, got N = {self.width}")
        return pack_bits(self.ancestor_mask()).view(torch.uint64)

    def to_sglang(self) -> SGLangTree:
        """The first-child / next-sibling arrays of SGLang's kernels; children in index order."""
        batch, width = self.tokens.shape
        index, child, sibling = (np.full((batch, width), -1, dtype=np.int64) for _ in range(3))
        for b, (parents, count) in enumerate(
            zip(self.parents.tolist(), self.num_nodes.tolist(), strict=True)
        ):
            index[b, :count] = np.arange(b * width, b * width + count)
            for node in range(count - 1, 0, -1):
                sibling[b, node] = child[b, parents[node]]
                child[b, parents[node]] = node
        return SGLangTree(*(torch.from_numpy(x).to(self.tokens.device) for x in (index, child, sibling)))

    # ---------------------------------------------------------------- checking

    def validate(self) -> None:
        """Checks the layout.

        Raises:
            ValueError: wrong dtype or shape, ``num_nodes`` out of range, a root that has a parent, a parent
                that is missing or stands behind its child, a cycle, or siblings that repeat a token. Names
                row and node.
        """
        self._validate_tensors()
        rows = zip(self.tokens.tolist(), self.parents.tolist(), self.num_nodes.tolist(), strict=True)
        for b, (tokens, parents, count) in enumerate(rows):
            if not 0 <= count <= self.width:
                raise ValueError(f"num_nodes[{b}] = {count} is outside [0, N = {self.width}]")
            if count and parents[0] != -1:
                raise ValueError(f"parents[{b}, 0] = {parents[0]}, the root's parent must be -1")
            seen: dict[tuple[int, int], int] = {}
            for node in range(1, count):
                _check_parent(b, node, parents, count)
                twin = seen.setdefault((parents[node], tokens[node]), node)
                if twin != node:
                    raise ValueError(
                        f"row {b}: duplicate siblings, nodes {twin} and {node} are both token {tokens[node]} "
                        f"below node {parents[node]}"
                    )

    def _validate_tensors(self) -> None:
        if self.tokens.dim() != 2:
            raise ValueError(f"tokens must be [B, N], got {tuple(self.tokens.shape)}")
        batch, width = self.tokens.shape
        expected = [
            ("tokens", self.tokens, torch.int64, (batch, width)),
            ("parents", self.parents, torch.int32, (batch, width)),
            ("num_nodes", self.num_nodes, torch.int32, (batch,)),
        ]
        if self.probs is not None:
            expected.append(("probs", self.probs, torch.float32, (batch, width)))
        for name, tensor, dtype, shape in expected:
            if tensor.dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {tuple(tensor.shape)}")


def pack_bits(mask: Tensor) -> Tensor:
    """``[..., T]`` bool with T <= 64 -> ``[...]`` int64 whose bit j is ``mask[..., j]``."""
    # The sum of distinct powers of two is their union; bit 63 is the sign.
    return (mask.to(torch.int64) << torch.arange(mask.shape[-1], device=mask.device)).sum(dim=-1)


def _same_length(name: str, given: Sequence, roots: Sequence) -> None:
    if len(given) != len(roots):
        raise ValueError(f"{name} has {len(given)} rows, roots has {len(roots)}")


def _check_parent(b: int, node: int, parents: list[int], count: int) -> None:
    parent = parents[node]
    if 0 <= parent < node:
        return
    if not 0 <= parent < count:
        raise ValueError(f"parents[{b}, {node}] = {parent} is not a node of the tree (0 .. {count - 1})")
    above, steps = parent, 0
    while above != node and 0 <= above < count and steps <= count:
        above, steps = parents[above], steps + 1
    if above == node:
        raise ValueError(f"row {b}: cycle through node {node} (its parent is {parent})")
    raise ValueError(
        f"parents[{b}, {node}] = {parent}: a parent must stand before its child (index below {node})"
    )
