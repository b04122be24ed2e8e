"""TokenTree: building, masks, the SGLang encoding, and errors that name what is wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specfuse.tree import TokenTree


@st.composite
def random_trees(draw, max_nodes: int = 24, batch: int = 2) -> TokenTree:
    tokens, parents = [], []
    for _ in range(batch):
        count = draw(st.integers(1, max_nodes))
        row_parents = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, count)]
        tokens.append(list(range(count)))
        parents.append(row_parents)
    return TokenTree.from_parents(tokens, parents)


def ancestors(parents: list[int], node: int) -> set[int]:
    found = set()
    while node >= 0:
        found.add(node)
        node = parents[node]
    return found


def test_chains_are_padded_to_the_longest_row():
    tree = TokenTree.from_chains([5, 6], [[7, 8, 9], []])
    assert tree.tokens.tolist() == [[5, 7, 8, 9], [6, 0, 0, 0]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2], [-1, -1, -1, -1]]
    assert tree.num_nodes.tolist() == [4, 1]
    assert tree.depths().tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert tree.positions(torch.tensor([10, 20])).tolist() == [[10, 11, 12, 13], [20, 20, 20, 20]]
    tree.validate()


def test_topk_expansion_orders_children_level_by_level():
    levels = [torch.tensor([[[1, 2]]]), torch.tensor([[[3, 4], [5, 6]]])]
    tree = TokenTree.from_topk([0], levels)
    assert tree.tokens.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert tree.parents.tolist() == [[-1, 0, 0, 1, 1, 2, 2]]


def test_topk_rejects_a_level_of_the_wrong_width():
    with pytest.raises(ValueError, match=r"levels\[1\] must be \[B=1, 2, k\]"):
        TokenTree.from_topk([0], [torch.tensor([[[1, 2]]]), torch.tensor([[[3, 4]]])])


def test_sequences_share_their_prefixes():
    tree = TokenTree.from_sequences([0], [[[1, 2, 3], [1, 2, 4], [5]]])
    assert tree.tokens.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2, 2, 0]]


@pytest.mark.parametrize("budget", [0, 1, 3, 5])
def test_sequences_respect_the_budget_of_drafted_nodes(budget):
    tree = TokenTree.from_sequences([0], [[[1, 2, 3], [1, 2, 4], [5]]], max_nodes=budget)
    assert tree.num_nodes.item() == budget + 1
    tree.validate()


@given(random_trees())
@settings(deadline=None, max_examples=50)
def test_ancestor_mask_and_bits_agree_with_walking_up(tree):
    mask, bits = tree.ancestor_mask(), tree.ancestor_bits()
    for b, parents in enumerate(tree.parents.tolist()):
        for node in range(tree.width):
            expected = ancestors(parents, node) if node < tree.num_nodes[b] else {node}
            assert set(mask[b, node].nonzero().flatten().tolist()) == expected
            assert int(bits.numpy()[b, node]) == sum(1 << a for a in expected)


def test_ancestor_bits_use_the_64th_bit():
    tree = TokenTree.from_chains([0], [list(range(1, 64))])
    assert int(tree.ancestor_bits().numpy()[0, 63]) == 2**64 - 1


def test_ancestor_bits_refuse_more_than_64_nodes():
    with pytest.raises(ValueError, match="N = 65"):
        TokenTree.from_chains([0], [list(range(1, 65))]).ancestor_bits()


@given(random_trees())
@settings(deadline=None, max_examples=50)
def test_sglang_encoding_round_trips(tree):
    encoded = tree.to_sglang()
    back = TokenTree.from_sglang(tree.tokens, encoded.next_token, encoded.next_sibling, tree.num_nodes)
    assert torch.equal(back.parents, tree.parents)
    for b, count in enumerate(tree.num_nodes.tolist()):
        assert encoded.retrieve_index[b, :count].tolist() == [b * tree.width + i for i in range(count)]
        assert (encoded.retrieve_index[b, count:] == -1).all()


def test_sglang_encoding_of_a_known_tree():
    encoded = TokenTree.from_parents([[9, 1, 2, 3]], [[-1, 0, 0, 1]]).to_sglang()
    assert encoded.next_token.tolist() == [[1, 3, -1, -1]]
    assert encoded.next_sibling.tolist() == [[-1, 2, -1, -1]]


def test_sglang_cycle_is_named():
    with pytest.raises(ValueError, match="cycle"):
        TokenTree.from_sglang(
            torch.tensor([[0, 1, 2]]), torch.tensor([[1, -1, -1]]), torch.tensor([[-1, 2, 1]])
        )


def tree_of(tokens, parents, num_nodes=None) -> TokenTree:
    count = len(tokens) if num_nodes is None else num_nodes
    return TokenTree(
        torch.tensor([tokens]),
        torch.tensor([parents], dtype=torch.int32),
        torch.tensor([count], dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (tree_of([0, 1, 2], [-1, 2, 1]), "cycle through node 1"),
        (tree_of([0, 1, 2, 3], [-1, 2, 0, 0]), r"parents\[0, 1\] = 2.*before its child"),
        (tree_of([0, 1, 2], [-1, 1, 0]), "cycle through node 1"),
        (tree_of([0, 4, 4], [-1, 0, 0]), "duplicate siblings, nodes 1 and 2 are both token 4"),
        (tree_of([0, 1], [0, 0]), "the root's parent must be -1"),
        (tree_of([0, 1], [-1, 7]), r"parents\[0, 1\] = 7 is not a node"),
        (tree_of([0, 1], [-1, -1]), r"parents\[0, 1\] = -1 is not a node"),
        (tree_of([0, 1], [-1, 0], num_nodes=3), r"num_nodes\[0\] = 3 is outside"),
        (
            tree_of([0], [-1])._replace(tokens=torch.zeros(1, 1)),
            "tokens must be torch.int64, got torch.float32",
        ),
        (tree_of([0], [-1])._replace(parents=torch.tensor([[-1]])), "parents must be torch.int32"),
        (tree_of([0], [-1])._replace(num_nodes=torch.ones(2, dtype=torch.int32)), r"num_nodes must be \[1\]"),
        (tree_of([0], [-1])._replace(tokens=torch.zeros(1, dtype=torch.int64)), r"tokens must be \[B, N\]"),
    ],
)
def test_validate_names_the_fault(tree, message):
    with pytest.raises(ValueError, match=message):
        tree.validate()


def test_same_token_below_different_parents_is_fine():
    tree_of([0, 4, 5, 4, 4], [-1, 0, 0, 1, 2]).validate()


def test_padding_is_not_looked_at():
    tree_of([0, 1, 999, 999], [-1, 0, 77, -9], num_nodes=2).validate()


def test_lengths_of_arguments_must_agree():
    with pytest.raises(ValueError, match="chains has 1 rows, roots has 2"):
        TokenTree.from_chains([0, 1], [[1]])
    with pytest.raises(ValueError, match="row 0: 1 parents for 2 tokens"):
        TokenTree.from_parents([[0, 1]], [[-1]])


def test_empty_batch():
    tree = TokenTree.from_chains([], [])
    tree.validate()
    assert tree.ancestor_mask().shape == (0, 0, 0)
