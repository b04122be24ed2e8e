"""A row's tree while a draft model grows it."""

from __future__ import annotations


class GrowingTree:
    """Nodes with their parents and the chance of being reached, in the order in which they were added.

    Args:
        root: the token below which the tree grows.
    """

    def __init__(self, root: int):
        self.tokens, self.parents, self.probs = [root], [-1], [1.0]
        self.ancestors: list[frozenset[int]] = [frozenset()]
        # First choice after first choice: what a greedy target says if the models agree, so it always stays.
        self.trunk = [0]

    def add(self, parent: int, token: int, chance: float) -> int:
        """Adds a child that is reached from its parent with ``chance``; returns its number."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.probs.append(self.probs[parent] * chance)
        self.ancestors.append(self.ancestors[parent] | {parent})
        return len(self.tokens) - 1

    def rank(self, node: int) -> tuple[bool, float]:
        """Sorts the trunk first, then by probability."""
        return node not in self.trunk, -self.probs[node]

    def is_ancestor(self, earlier: int, node: int) -> bool:
        """Whether ``earlier`` is on the way to ``node``."""
        return earlier in self.ancestors[node]

    def path(self, node: int) -> list[int]:
        """The nodes on the way to ``node``, without the root, with it."""
        return sorted(self.ancestors[node] - {0}) + ([node] if node else [])

    def best(self, max_nodes: int) -> tuple[list[int], list[int], list[float]]:
        """The trunk and the most probable nodes: a tree, since probabilities fall along a path."""
        order = sorted(range(len(self.tokens)), key=self.rank)[: max_nodes + 1]
        chosen = sorted(order)
        place = {node: i for i, node in enumerate(chosen)}
        parents = [-1 if node == 0 else place[self.parents[node]] for node in chosen]
        return [self.tokens[n] for n in chosen], parents, [self.probs[n] for n in chosen]
