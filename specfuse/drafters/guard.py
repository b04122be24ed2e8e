"""What the loop lets through of a drafter's tree: drafters may be wrong, never harmful."""

from __future__ import annotations

import torch

from specfuse.drafters.base import DraftState
from specfuse.passes.tree_layout import UNBOUNDED, holds_foreign_tokens, is_sound
from specfuse.tree import TokenTree


def checked(tree: TokenTree, state: DraftState, max_nodes: int, drafter: object) -> TokenTree:
    """The tree itself, if a drafter may return it.

    Raises:
        ValueError: not a TokenTree on the CPU, a layout that ``TokenTree.validate`` refuses, more nodes than
            asked for, or an active row whose root is not ``state.root(row)``. Names the drafter's class.
    """
    fault = _fault(tree, state, max_nodes)
    if fault:
        raise ValueError(f"drafter {type(drafter).__name__} returned {fault}")
    return tree


def _fault(tree: object, state: DraftState, max_nodes: int) -> str | None:
    if not isinstance(tree, TokenTree):
        return f"{type(tree).__name__}, not a TokenTree"
    if not tree.tokens.is_cpu:
        return f"a tree on {tree.tokens.device}, it belongs on the CPU"
    if not is_sound(tree):
        try:
            tree.validate()
        except ValueError as error:
            return f"a bad tree: {error}"
    if tree.batch_size != state.batch_size or not 1 <= tree.width <= max_nodes + 1:
        return (
            f"trees of shape {tuple(tree.tokens.shape)} for {state.batch_size} rows and at most "
            f"{max_nodes} nodes besides the root"
        )
    roots = zip(tree.tokens[:, 0].tolist(), tree.num_nodes.tolist(), state.active, strict=True)
    for row, (token, count, active) in enumerate(roots):
        if active and (count < 1 or token != state.root(row)):
            return f"row {row} with root {token} and {count} nodes, its root is {state.root(row)}"
    return None


def leave_out_finished(tree: TokenTree, state: DraftState) -> TokenTree:
    """Rows that have finished take no part: their ``num_nodes`` becomes 0."""
    if all(state.active):
        return tree
    keep = torch.tensor(state.active, dtype=torch.int32)
    return tree._replace(num_nodes=tree.num_nodes * keep)


def without_foreign_tokens(tree: TokenTree, state: DraftState) -> TokenTree:
    """Drops nodes the target has no embedding for, and placeholders that would ask it for pixels."""
    if not holds_foreign_tokens(tree, state.vocab_size, state.visual_token_ids):
        return tree
    limit = state.vocab_size if state.vocab_size is not None else UNBOUNDED
    rows = []
    for tokens, parents, count in zip(
        tree.tokens.tolist(), tree.parents.tolist(), tree.num_nodes.tolist(), strict=True
    ):
        kept: dict[int, int] = {0: 0}
        row, row_parents = [tokens[0]], [-1]
        for node in range(1, count):
            bad = not 0 <= tokens[node] < limit or tokens[node] in state.visual_token_ids
            if not bad and parents[node] in kept:
                kept[node] = len(row)
                row.append(tokens[node])
                row_parents.append(kept[parents[node]])
        rows.append((row, row_parents))
    return TokenTree.from_parents([row for row, _ in rows], [parents for _, parents in rows])
