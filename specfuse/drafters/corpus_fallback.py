"""CorpusIndex in plain Python, for installations without a compiler: the same interface, a simpler model.

It blends the last 0 to 8 tokens with fixed weights, where the native index has more contexts and learns its
weights. On the recorded Video-LLaVA answers it reaches 6.28 tokens per pass with 16 nodes (native: 6.71), and
a tree takes hundreds of microseconds instead of ten.
"""

from __future__ import annotations

import heapq
import threading
from collections import defaultdict, deque

import numpy as np

_ORDERS = (0, 1, 2, 3, 4, 6, 8)
_DECAY = 0.9  # of a successor's weight, per occurrence of its context
_LIGHTEST = 0.05  # successors below this weight are forgotten
_START = -1  # stands before the first token
_BYTES_PER_ENTRY = 100  # of a dictionary entry with its key and value, roughly


class PythonCorpusIndex:
    """What ``specfuse._C_cpu.CorpusIndex`` does, with the same methods and arguments."""

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._answers: deque[tuple[list[int], int, int]] = deque()
        self._tokens = 0
        # (order, tokens) -> {token: [weight, serial number of the last answer that had it]}
        self._contexts: dict[tuple[int, ...], dict[int, list[float]]] = defaultdict(dict)
        self._serial = 0

    # ---------------------------------------------------------------- learning

    def observe(self, tokens: np.ndarray, scope: int = 0, evidence: int = 0) -> None:
        if tokens.size and tokens.min() < 0:
            raise ValueError(f"tokens must not be negative, got {int(tokens.min())}")
        with self._lock:
            self._observe(tokens[-self.max_tokens :].tolist(), scope, evidence)

    def _observe(self, tokens: list[int], scope: int, evidence: int) -> None:
        if not tokens:
            return
        while self._answers and self._tokens + len(tokens) > self.max_tokens:
            self._tokens -= len(self._answers.popleft()[0])
        for i, token in enumerate(tokens):
            for key in self._keys(tokens[:i], scope):
                successors = self._contexts[key]
                for other in list(successors):
                    successors[other][0] *= _DECAY
                    if successors[other][0] < _LIGHTEST:
                        del successors[other]
                entry = successors.setdefault(token, [0.0, 0])
                entry[0] += 1.0
                entry[1] = self._serial
        self._answers.append((tokens, scope, evidence))
        self._serial += 1
        self._tokens += len(tokens)
        self._drop_dead()

    def _drop_dead(self) -> None:
        # One sweep per as many answers as are alive: the cost per answer does not grow with their number.
        if self._serial % max(len(self._answers), 1) or self._oldest == 0:
            return
        for key, successors in list(self._contexts.items()):
            for token in [t for t, (_, last) in successors.items() if last < self._oldest]:
                del successors[token]
            if not successors:
                del self._contexts[key]

    @property
    def _oldest(self) -> int:
        return self._serial - len(self._answers)

    def _keys(self, answer: list[int], scope: int) -> list[tuple[int, ...]]:
        """Contexts of the next token, least specific first; one of them knows the question."""
        tail = [_START, *answer][-max(_ORDERS) :]
        keys = [(order, *tail[-order:]) if order else (0,) for order in _ORDERS if order <= len(tail)]
        return [*keys, (-1, scope, *tail[-4:])]

    # ---------------------------------------------------------------- drafting

    def propose(
        self,
        answer: np.ndarray,
        skipped: int = 0,
        scope: int = 0,
        evidence: int = 0,
        max_nodes: int = 16,
        max_depth: int = 1 << 20,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens: list[int] = []
        parents: list[int] = []
        probs: list[float] = []
        paths: list[list[int]] = []
        heap: list[tuple[float, int, int]] = []

        def expand(node: int, path: list[int], prob: float) -> None:
            if len(path) < max_depth:
                for token, share in self._predict([*answer.tolist(), *path], scope).items():
                    heapq.heappush(heap, (-prob * share, node, token))

        with self._lock:
            if max_nodes > 0:
                expand(-1, [], 1.0)
            while heap and len(tokens) < max_nodes:
                negative, parent, token = heapq.heappop(heap)
                tokens.append(token)
                parents.append(parent)
                probs.append(-negative)
                paths.append([*(paths[parent] if parent >= 0 else []), token])
                expand(len(tokens) - 1, paths[-1], -negative)
        return np.array(tokens, np.int32), np.array(parents, np.int32), np.array(probs, np.float32)

    def _predict(self, answer: list[int], scope: int) -> dict[int, float]:
        shares: dict[int, float] = defaultdict(float)
        rest = 1.0
        for key in reversed(self._keys(answer, scope)):
            live = {
                token: weight / (2 + self._serial - last) ** 0.5
                for token, (weight, last) in self._contexts.get(key, {}).items()
                if last >= self._oldest
            }
            total = sum(live.values())
            if not live:
                continue
            # The more different successors, the more is left to the less specific contexts.
            gate = 0.8 if len(live) == 1 else 0.5
            for token, weight in live.items():
                shares[token] += rest * gate * weight / total
            rest *= 1 - gate
        return shares

    # ---------------------------------------------------------------- content

    def clear(self) -> None:
        with self._lock:
            self._forget()

    @property
    def num_answers(self) -> int:
        return len(self._answers)

    @property
    def num_tokens(self) -> int:
        return self._tokens

    @property
    def nbytes(self) -> int:
        return _BYTES_PER_ENTRY * sum(1 + len(successors) for successors in self._contexts.values())

    def export_content(self) -> tuple[np.ndarray, ...]:
        with self._lock:
            answers = list(self._answers)
        return (
            np.array([token for tokens, _, _ in answers for token in tokens], np.int32),
            np.array([len(tokens) for tokens, _, _ in answers], np.int64),
            np.array([scope for _, scope, _ in answers], np.uint64),
            np.array([evidence for _, _, evidence in answers], np.uint64),
            np.zeros(0, np.float32),  # it learns no gates
        )

    def import_content(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        scopes: np.ndarray,
        evidence: np.ndarray,
        gates: np.ndarray,
    ) -> None:
        fits = len(lengths) == len(scopes) == len(evidence) and (lengths > 0).all()
        if not fits or lengths.sum() != len(tokens) or (tokens.size and tokens.min() < 0):
            raise ValueError(f"the arrays do not fit together: {len(tokens)} tokens, {len(lengths)} lengths")
        with self._lock:
            self._forget()
            start = 0
            for length, scope, hint in zip(lengths.tolist(), scopes.tolist(), evidence.tolist(), strict=True):
                self._observe(tokens[start : start + length][-self.max_tokens :].tolist(), scope, hint)
                start += length
