"""Semantic acceptance: a drafted phrase may stand for the target's where both mean the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specfuse.acceptance.cosine import cosines_of
from specfuse.acceptance.rule import AcceptanceRule, Judgement, ScoredTree

Embedding = Callable[[list[str]], Tensor]
"""n texts to ``[n, D]`` floats."""
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
NO_EMBEDDING = (
    "no sentence embedding: pip install specfuse[semantic] and download " + MODEL + " once, or pass embed="
)
_LOG = logging.getLogger(__name__)


class TokenEmbedding:
    """Texts as the mean of a model's input embeddings of their tokens, less their mean over the vocabulary.

    Small and always there, and blind to the order of words: good for a try and for tests.

    Args:
        model: any Hugging Face model with input embeddings.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.tokenizer = tokenizer
        weight = model.get_input_embeddings().weight.detach().float()
        self.vectors = weight - weight.mean(0)

    def __call__(self, texts: list[str]) -> Tensor:
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        zero = self.vectors.new_zeros(self.vectors.shape[1])
        return torch.stack([self.vectors[row].mean(0) if row else zero for row in rows])


def default_embedding() -> Embedding | None:
    """A small sentence-transformers model from the local cache; None without the library or the model."""
    try:
        from sentence_transformers import SentenceTransformer

        encoder = SentenceTransformer(MODEL, local_files_only=True)
    except (ImportError, OSError, ValueError) as error:
        _LOG.warning("accept='semantic' answers exactly: %s (%s)", NO_EMBEDDING, type(error).__name__)
        return None
    return lambda texts: encoder.encode(texts, convert_to_tensor=True)


class SemanticAcceptance(AcceptanceRule):
    """Compares, where draft and target part, the drafted phrase with the target's. **Lossy.**

    The drafted phrase are the likeliest drafts from there to where the target's next choice along them is the
    draft again, at the end of a word; the target's phrase are its choices along the same drafts. Both with
    the last ``left_words`` words of the answer in front are embedded; where their cosine reaches
    ``threshold`` the drafted phrase stands. Where draft and target do not meet again within ``longest``
    tokens, or within what was drafted, nothing is accepted.

    What this is good for: synonyms and rearranged phrases, where a wrong number or colour must not pass. The
    target's phrase is made of one-step choices behind *drafted* words, not of what it would have said by
    itself, and embeddings tell "two cars" from "three cars" badly: measure facts before relying on it.

    Args:
        tokenizer: the target's.
        embed: texts to vectors; None: nothing is ever accepted, and the output's ``acceptance`` says why.
        threshold: least cosine, in [-1, 1].
        longest: tokens of a phrase at most, at least 1.
        left_words: words in front of both phrases.

    Raises:
        ValueError: a number out of range, or an embedding that can not be called.
    """

    name = "semantic"

    def __init__(
        self,
        tokenizer: Any,
        embed: Embedding | None,
        *,
        threshold: float = 0.9,
        longest: int = 8,
        left_words: int = 3,
    ):
        if not -1.0 <= threshold <= 1.0:
            raise ValueError(f"threshold must lie in [-1, 1], got {threshold}")
        if longest < 1 or left_words < 0:
            raise ValueError(f"longest must be at least 1, left_words 0, got {longest} and {left_words}")
        if embed is not None and not callable(embed):
            raise ValueError(f"embed must be callable or None, got {type(embed).__name__}")
        self.tokenizer, self.embed = tokenizer, embed
        self.threshold, self.longest, self.left_words = threshold, longest, left_words

    def settings(self) -> dict[str, Any]:
        embed = None if self.embed is None else getattr(self.embed, "__name__", type(self.embed).__name__)
        numbers = {"threshold": self.threshold, "longest": self.longest, "left_words": self.left_words}
        return {"embedding": embed, **numbers}

    def judge(self, scored: ScoredTree) -> Judgement:
        if self.embed is None:
            scored.tally.fallback = NO_EMBEDDING
            return Judgement()
        return _Phrases(self, scored)


class _Phrases(Judgement):
    def __init__(self, rule: SemanticAcceptance, scored: ScoredTree):
        self.rule, self.scored = rule, scored

    def overrule(self, row: int, path: list[int]) -> list[int]:
        scored, rule = self.scored, self.rule
        tokens, picks, children = scored.tokens[row], scored.picks[row], scored.children[row]
        said = [*scored.state.answers[row], *(tokens[node] for node in path[1:])]
        nodes: list[int] = []
        wanted: list[int] = []
        node = path[-1]
        while children[node] and len(nodes) < rule.longest:
            # Inside a word the two may agree before the phrase is over.
            child = next((c for c in children[node] if tokens[c] == picks[node]), children[node][0])
            nodes.append(child)
            wanted.append(picks[node])
            node = child
            if picks[node] < 0 or {tokens[node], picks[node]} & scored.ends:
                return []
            together = any(tokens[c] == picks[node] for c in children[node])
            if together and self._begins_word([*said, *(tokens[n] for n in nodes)], picks[node]):
                drafted = [tokens[n] for n in nodes]
                return nodes if self._alike(said, drafted, wanted) else []
        return []

    def _begins_word(self, before: Sequence[int], token: int) -> bool:
        """Whether a token stands apart from what is before it: after a space, or not a letter or digit."""
        text, longer = (self.rule.tokenizer.decode(ids) for ids in (before[-4:], [*before[-4:], token]))
        return not longer[len(text) : len(text) + 1].isalnum()

    def _alike(self, said: Sequence[int], drafted: list[int], wanted: list[int]) -> bool:
        rule = self.rule
        assert rule.embed is not None
        # More tokens than words are needed: a word may be several.
        left = rule.tokenizer.decode(said[-8 * rule.left_words :] if rule.left_words else [])
        left = " ".join(left.split()[-rule.left_words :]) if rule.left_words else ""
        texts = [f"{left} {rule.tokenizer.decode(ids).strip()}" for ids in (drafted, wanted)]
        found = rule.embed(texts)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != 2:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"embed must return a tensor [n, D] for n texts, got {shape} for 2")
        return bool(cosines_of(found[:1].float(), found[1:].float(), None)[0] >= rule.threshold)
