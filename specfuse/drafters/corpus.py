"""CorpusDrafter: remembers finished answers and drafts what they make likely."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch

from specfuse.drafters.base import Drafter, DraftState
from specfuse.drafters.corpus_fallback import PythonCorpusIndex
from specfuse.drafters.corpus_file import Kinds, read_arrays, write_arrays
from specfuse.ops import native
from specfuse.tree import TokenTree

_FORMAT = "specfuse corpus 1"
# The index looks no further back than this into the answer so far.
_REACH = 256
_MAX_ID = 2**31 - 1

# Of a row: tokens, parents (-1 hangs from the root), probabilities of the paths; [n] each.
Draft = tuple[np.ndarray, np.ndarray, np.ndarray]


class CorpusContent(NamedTuple):
    """A answers and what was learned about blending contexts; an empty ``gates`` is learned again."""

    tokens: np.ndarray  # [total] int32, answers one after the other, oldest first
    lengths: np.ndarray  # [A] int64
    scopes: np.ndarray  # [A] uint64, hashes of the questions
    evidence: np.ndarray  # [A] uint64, hashes of other models' answers, 0 where there was none
    gates: np.ndarray  # float32


_KINDS: Kinds = {
    "tokens": (np.int32, 1),
    "lengths": (np.int64, 1),
    "scopes": (np.uint64, 1),
    "evidence": (np.uint64, 1),
    "gates": (np.float32, 1),
}


class CorpusDrafter(Drafter):
    """Drafts from the answers that this object has seen before, whatever model gave them.

    Every context of the answer so far that occurred in an earlier answer predicts the next token: its last 1
    to 20 tokens, the last tokens at this place of the answer, the longest match. A context's successors count
    the more the more recent they are, and the contexts are blended, from the least to the most specific, with
    gates learned from every observed answer::

        p_k(token) = gate_k * q_k(token) + (1 - gate_k) * p_{k-1}(token)

    The tree is grown best first by path probability, to the depth that ``state.remaining`` allows, and exists
    from the first pass of an answer on. Answers to the same question count more than others. One object may
    serve any number of calls and threads at once.

    The index is native code; without it (no compiler at installation) a simpler one in Python replaces it.

    Args:
        max_tokens: how many tokens of answers are kept, the oldest answers leaving first. At most about 100
            bytes of memory each.

    Raises:
        ValueError: ``max_tokens`` below 1 or above 2**31 - 1.

    Source: Witten and Bell, "The zero-frequency problem", IEEE Transactions on Information Theory, 1991
        (blending of context lengths); Mahoney, "Adaptive weighing of context models for lossless data
        compression", 2005 (weights learned online).
    """

    def __init__(self, max_tokens: int = 1_000_000):
        if not 1 <= max_tokens <= _MAX_ID:
            raise ValueError(f"max_tokens must be from 1 to {_MAX_ID}, got {max_tokens}")
        index = PythonCorpusIndex if native.cpu is None else native.cpu.CorpusIndex
        self._index: Any = index(max_tokens)

    # ---------------------------------------------------------------- drafting

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        """See :meth:`Drafter.propose`. No deeper than ``remaining - 1``: what lies beyond cannot be used."""
        drafts = [self.draft_row(state, b, max_nodes) for b in range(state.batch_size)]
        return as_trees([state.root(b) for b in range(state.batch_size)], drafts)

    def draft_row(self, state: DraftState, row: int, max_nodes: int) -> Draft:
        """The nodes of one row's tree, without its root."""
        known = state.memory.setdefault(id(self), {})
        if row not in known:
            hint = state.evidence[row] if state.evidence else None
            known[row] = (question_hash(state.question(row)), _evidence(hint))
        scope, evidence = known[row]
        answer = state.answers[row]
        drafted = self._index.propose(
            np.array(answer[-_REACH:], dtype=np.int32),
            skipped=max(len(answer) - _REACH, 0),
            scope=scope,
            evidence=evidence,
            max_nodes=max_nodes,
            max_depth=max(state.remaining[row] - 1, 0) if state.active[row] else 0,
        )
        return _within(state.vocab_size, *drafted)

    # ---------------------------------------------------------------- learning

    def observe(
        self,
        tokens: Sequence[int],
        question: Sequence[int] = (),
        evidence: Sequence[int] | None = None,
    ) -> None:
        """Learns one finished answer.

        Args:
            tokens: its token ids, end-of-sequence token included if it was emitted.
            question: token ids of what was asked; answers to the same question help each other most.
            evidence: another model's answer on the same input, if the same will be given when drafting.

        Raises:
            ValueError: a token id that is negative, above 2**31 - 1 or not an integer.
        """
        self._index.observe(
            token_ids("tokens", tokens), scope=question_hash(question), evidence=_evidence(evidence)
        )

    def clear(self) -> None:
        """Forgets everything."""
        self._index.clear()

    # ---------------------------------------------------------------- content

    def __len__(self) -> int:
        """Number of answers remembered."""
        return int(self._index.num_answers)

    def __bool__(self) -> bool:
        return True  # an empty drafter is still a drafter

    @property
    def num_tokens(self) -> int:
        """Number of tokens remembered, at most ``max_tokens``."""
        return int(self._index.num_tokens)

    @property
    def max_tokens(self) -> int:
        """How many tokens are kept at most."""
        return int(self._index.max_tokens)

    @property
    def nbytes(self) -> int:
        """Memory the index holds, in bytes."""
        return int(self._index.nbytes)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the remembered answers and what was learned about blending to a safetensors file.

        Questions are stored as hashes. The answers themselves are readable token ids.

        Raises:
            FileNotFoundError, IsADirectoryError: ``path`` is in no existing directory, or is one.
        """
        write_arrays(path, self.content()._asdict(), _FORMAT)

    def load(self, path: str | PathLike[str]) -> CorpusDrafter:
        """Replaces the content by that of a file written by :meth:`save`; returns this object.

        The answers are learned again in their order, so proposals are those of the drafter that was saved,
        unless that one had already evicted answers. Of more than ``max_tokens`` tokens the newest stay.

        Raises:
            ValueError: the file is not a saved CorpusDrafter or its arrays do not fit together.
            FileNotFoundError: there is no such file.
        """
        self.replace(CorpusContent(**read_arrays(path, _KINDS, _FORMAT, "CorpusDrafter")))
        return self

    def content(self) -> CorpusContent:
        """What is remembered now."""
        return CorpusContent(*self._index.export_content())

    def replace(self, content: CorpusContent) -> None:
        """Forgets everything and learns ``content`` instead, in its order.

        Raises:
            ValueError: the arrays do not fit together.
        """
        self._index.import_content(*content)


def _within(vocab_size: int | None, tokens: np.ndarray, parents: np.ndarray, probs: np.ndarray) -> Draft:
    """The draft without ids that the target does not have, and without what hangs below them."""
    if vocab_size is None or not (tokens >= vocab_size).any():
        return tokens, parents, probs
    place = {-1: -1}
    for node, (token, parent) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
        if token < vocab_size and parent in place:
            place[node] = len(place) - 1
    kept = list(place)[1:]
    return tokens[kept], np.array([place[parents[node]] for node in kept], dtype=np.int32), probs[kept]


def as_trees(roots: list[int], drafts: list[Draft]) -> TokenTree:
    """Drafts behind their roots, padded to the widest."""
    counts = np.array([1 + len(tokens) for tokens, _, _ in drafts], dtype=np.int32)
    shape = (len(drafts), int(counts.max(initial=0)))
    tree_tokens = np.zeros(shape, dtype=np.int64)
    tree_parents = np.full(shape, -1, dtype=np.int32)
    tree_probs = np.zeros(shape, dtype=np.float32)
    for b, (root, (tokens, parents, probs)) in enumerate(zip(roots, drafts, strict=True)):
        tree_tokens[b, 0], tree_tokens[b, 1 : counts[b]] = root, tokens
        tree_parents[b, 1 : counts[b]] = parents + 1
        tree_probs[b, 0], tree_probs[b, 1 : counts[b]] = 1.0, probs
    return TokenTree(*map(torch.from_numpy, (tree_tokens, tree_parents, counts, tree_probs)))


def token_ids(name: str, tokens: Sequence[int]) -> np.ndarray:
    """Token ids as int32, checked. ``array`` refuses what is not an integer and is faster than NumPy here."""
    try:
        ids = np.frombuffer(array("i", tokens), dtype=np.int32)
    except TypeError:
        raise ValueError(f"{name} must be a flat sequence of integers, got {_short(tokens)}") from None
    except OverflowError:
        raise ValueError(f"{name} must hold ids from 0 to {_MAX_ID}, got {_short(tokens)}") from None
    if ids.size and ids.min() < 0:
        raise ValueError(f"{name} must hold ids from 0 to {_MAX_ID}, got {int(ids.min())}")
    return ids


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _digest(kind: bytes, name: str, tokens: Sequence[int]) -> int:
    ids = token_ids(name, tokens)
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8, person=kind).digest(), "little")


def question_hash(question: Sequence[int]) -> int:
    """What a corpus keeps of a question: 64 bits of its token ids."""
    return _digest(b"question", "question", question)


def _evidence(tokens: Sequence[int] | None) -> int:
    # 0 means that there is none.
    return 0 if tokens is None else _digest(b"evidence", "evidence", tokens) or 1
