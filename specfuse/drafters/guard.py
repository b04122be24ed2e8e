"""What the loop lets through of a drafter's tree: drafters may be wrong, never harmful."""

from __future__ import annotations

import torch

from specfuse.drafters.base import DraftState
from specfuse.tree import TokenTree


def leave_out_finished(tree: TokenTree, state: DraftState) -> TokenTree:
    """Rows that have finished take no part: their ``num_nodes`` becomes 0."""
    if all(state.active):
        return tree
    keep = torch.tensor(state.active, dtype=torch.int32)
    return tree._replace(num_nodes=tree.num_nodes * keep)


def without_foreign_tokens(tree: TokenTree, state: DraftState) -> TokenTree:
    """Drops nodes the target has no embedding for, and placeholders that would ask it for pixels."""
    limit = state.vocab_size if state.vocab_size is not None else 2**62
    drafts = tree.tokens[:, 1:]
    foreign = (drafts < 0) | (drafts >= limit)
    for token in state.visual_token_ids:
        foreign |= drafts == token
    if not bool(foreign.any()):
        return tree
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
