"""Drafters for the tests: some know the answer and surround it with wrong branches, one knows nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence

from specfuse.drafters import Drafter, DraftState
from specfuse.tree import TokenTree


class RandomTreeDrafter(Drafter):
    """Random trees of random tokens, up to the whole budget: almost nothing is accepted."""

    def __init__(self, vocab: int, seed: int = 0):
        self.vocab = vocab
        self.random = random.Random(seed)

    def true_path(self, state: DraftState, row: int) -> Sequence[int]:
        return ()

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        tokens, parents = [], []
        for row in range(state.batch_size):
            trie = _Trie(state.root(row))
            size = self.random.randint(0, max_nodes)
            node = 0
            for token in self.true_path(state, row)[: self.random.randint(0, max_nodes)]:
                # Wrong siblings come before and after the right one, so that its place varies.
                while len(trie.tokens) <= size and self.random.random() < 0.5:
                    trie.add(node, self.random.randrange(self.vocab))
                if len(trie.tokens) > size:
                    break
                node = trie.add(node, token)
            while len(trie.tokens) <= size:
                trie.add(self.random.randrange(len(trie.tokens)), self.random.randrange(self.vocab))
            tokens.append(trie.tokens)
            parents.append(trie.parents)
        tree = TokenTree.from_parents(tokens, parents)
        tree.validate()
        return tree


class OracleDrafter(RandomTreeDrafter):
    """Knows each row's answer; trees hold a piece of it, at random places among random tokens."""

    def __init__(self, answers: Sequence[Sequence[int]], vocab: int, seed: int = 0):
        super().__init__(vocab, seed)
        self.known = [list(answer) for answer in answers]

    def true_path(self, state: DraftState, row: int) -> Sequence[int]:
        return self.known[row][len(state.answers[row]) :]


class OracleChainDrafter(Drafter):
    """Chains of the right answer, ``depth`` tokens at a time."""

    def __init__(self, answers: Sequence[Sequence[int]], depth: int):
        self.known, self.depth = [list(answer) for answer in answers], depth

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        depth = min(self.depth, max_nodes)
        chains = [
            answer[len(done) : len(done) + depth]
            for answer, done in zip(self.known, state.answers, strict=True)
        ]
        return TokenTree.from_chains([state.root(b) for b in range(state.batch_size)], chains)


class _Trie:
    def __init__(self, root: int):
        self.tokens, self.parents = [root], [-1]
        self.children: dict[tuple[int, int], int] = {}

    def add(self, parent: int, token: int) -> int:
        node = self.children.get((parent, token))
        if node is None:
            node = self.children[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
        return node
