"""PromptLookupDrafter: drafts what followed the same n-gram earlier in this prompt and answer."""

from __future__ import annotations

from collections import defaultdict

from specfuse.drafters.base import Drafter, DraftState
from specfuse.tree import TokenTree

# Chance that the next token repeats after a match of n tokens, before anything is known; CombinedDrafter
# calibrates.
_PRIOR = {1: 0.25, 2: 0.5, 3: 0.65}
_LONG_MATCH = 0.8


class PromptLookupDrafter(Drafter):
    """n-gram lookup in the request's own text, as a tree: several earlier matches become branches.

    Args:
        max_ngram: longest context that is looked up (longer matches come first).
        min_ngram: shortest context.
        max_matches: earlier occurrences followed per context length, most recent first.
        max_depth: longest continuation copied from one occurrence.

    Source: Saxena, "Prompt Lookup Decoding", 2023 (chains); here merged into a tree.
    """

    def __init__(self, max_ngram: int = 4, min_ngram: int = 1, max_matches: int = 4, max_depth: int = 16):
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"min_ngram must be from 1 to max_ngram={max_ngram}, got {min_ngram}")
        if max_matches < 1 or max_depth < 1:
            raise ValueError(
                f"max_matches and max_depth must be at least 1, got {max_matches} and {max_depth}"
            )
        self.max_ngram, self.min_ngram = max_ngram, min_ngram
        self.max_matches, self.max_depth = max_matches, max_depth

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        texts = state.memory.get(id(self))
        if texts is None:
            texts = state.memory[id(self)] = [
                _IndexedText([t for t in prompt if t not in state.visual_token_ids], self.max_ngram)
                for prompt in state.prompts
            ]
        rows = []
        for row, text in enumerate(texts):
            text.extend(state.answers[row])
            depth = min(self.max_depth, state.remaining[row] - 1) if state.active[row] else 0
            rows.append(self._draft(text, state.root(row), max_nodes, depth))
        return TokenTree.from_parents(*map(list, zip(*rows, strict=True)))

    def _draft(
        self, text: _IndexedText, root: int, max_nodes: int, depth: int
    ) -> tuple[list[int], list[int], list[float]]:
        tokens, parents, probs = [root], [-1], [1.0]
        children: dict[tuple[int, int], int] = {}
        for order in range(self.max_ngram, self.min_ngram - 1, -1):
            prior = _PRIOR.get(order, _LONG_MATCH)
            for match, start in enumerate(text.matches(order)[: self.max_matches]):
                node, chance = 0, prior / (match + 1)
                for token in text.ids[start : start + depth]:
                    child = children.get((node, token))
                    if child is None:
                        if len(tokens) > max_nodes:
                            return tokens, parents, probs
                        child = children[node, token] = len(tokens)
                        tokens.append(token)
                        parents.append(node)
                        probs.append(probs[node] * chance)
                    # Having followed a copy for a while, the copy is likely to go on.
                    node, chance = child, _LONG_MATCH
        return tokens, parents, probs


class _IndexedText:
    """Token ids with, for every n-gram, the positions right behind its occurrences."""

    def __init__(self, ids: list[int], max_ngram: int):
        self.ids: list[int] = []
        self.prompt_length = len(ids)
        self.max_ngram = max_ngram
        self.behind: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self._append(ids)

    def extend(self, answer: list[int]) -> None:
        self._append(answer[len(self.ids) - self.prompt_length :])

    def _append(self, ids: list[int]) -> None:
        for token in ids:
            self.ids.append(token)
            end = len(self.ids)
            for order in range(1, min(self.max_ngram, end) + 1):
                self.behind[tuple(self.ids[end - order : end])].append(end)

    def matches(self, order: int) -> list[int]:
        """Positions behind earlier occurrences of the last ``order`` tokens, most recent first."""
        if order > len(self.ids):
            return []
        return self.behind[tuple(self.ids[-order:])][-2::-1]
