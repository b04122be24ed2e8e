"""SceneMemory: drafts from what was said about the earlier scenes that look most like this one."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from specfuse.drafters.base import Drafter, DraftState
from specfuse.drafters.corpus import CorpusDrafter, as_trees, question_hash, token_ids
from specfuse.drafters.corpus_file import read_arrays, write_arrays
from specfuse.drafters.scene_store import FORMAT, KINDS, Answer, SceneStore, content_of
from specfuse.drafters.scenes import SceneFeatures
from specfuse.events import EventStream
from specfuse.ops import native
from specfuse.tree import TokenTree

FEATURES = "scene_features"
"""Under this name a call's ``draft_inputs`` or ``events`` hold ``[B, I]`` features, or ``[1, I]`` for all."""
_INDEXES = 8  # indexes kept, of the scenes asked about last


class _Row(NamedTuple):
    """A row of a call."""

    scene: tuple[int, np.ndarray] | None  # key and features [D]; None where the call gave none
    near: Future[CorpusDrafter] | None  # its index


class SceneMemory(Drafter):
    """A :class:`CorpusDrafter` whose answers are ordered anew for every scene, the most similar scenes last.

    Scenes are compared by the cosine of their features, after an adapter if there is one. A corpus trusts
    what it saw last; the index of a scene has seen its nearest neighbours last. It is made at the first
    question about the scene, by a thread of its own in about 0.4 us a token, and learns the scene's own
    answers as they come. A call without features, or whose index is not made yet, drafts as a CorpusDrafter.

    Args:
        encode: features ``[S, I]`` of S event streams rendered at some size, e.g. :func:`pooled_events`: with
            it a call takes ``events=``. Without it features come as ``draft_inputs``, see ``FEATURES``, from
            any encoder: an event camera's, or the target's own.
        adapter: brings features of events to the target's (``specfuse train adapter --features pooled``), so
            that scenes known by events and by video (``remember(..., aligned=True)``) are compared.
        max_tokens: how many tokens of answers are kept, the oldest scenes leaving first.
        nearest_tokens: how many tokens of the nearest scenes' answers an index learns. More help little and
            take longer.
        background: False waits for a scene's index, so that drafts do not depend on the time it takes.

    Raises:
        ValueError: ``nearest_tokens`` below 1, or ``max_tokens`` as for :class:`CorpusDrafter`.
    """

    def __init__(
        self,
        encode: Callable[[list[EventStream], Any], Tensor] | None = None,
        adapter: nn.Module | None = None,
        *,
        max_tokens: int = 1_000_000,
        nearest_tokens: int = 65_536,
        background: bool = True,
    ):
        if nearest_tokens < 1:
            raise ValueError(f"nearest_tokens must be at least 1, got {nearest_tokens}")
        self.corpus = CorpusDrafter(max_tokens)  # of all answers: drafts without features, learns the gates
        self.adapter, self.nearest_tokens = adapter, nearest_tokens
        self.takes_events = encode is not None
        self._seen = None if encode is None else SceneFeatures(encode)
        self._store = SceneStore(max_tokens)
        self._indexes: OrderedDict[int, Future[CorpusDrafter]] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, "specfuse scenes") if background else None
        self._lock = threading.Lock()

    def see(self, events: Any, event_size: tuple[int, int] | str | None = None) -> dict[str, Tensor]:
        """Features of S streams or files of events, for ``events`` of a call; encoded once each.

        Raises:
            ValueError: a memory without ``encode``.
            FileNotFoundError, ValueError: as :func:`specfuse.events.load`.
        """
        if self._seen is None:
            raise ValueError("events: this SceneMemory has no encode; give features as draft_inputs")
        scenes = [events] if isinstance(events, EventStream | str | PathLike) else list(events)
        return {FEATURES: self._seen.of(scenes, event_size)}

    # ---------------------------------------------------------------- drafting

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        """See :meth:`Drafter.propose`."""
        drafts = []
        for b, (_, index) in enumerate(self._scenes(state)):
            drafter = self.corpus if index is None or not index.done() else index.result()
            drafts.append(drafter.draft_row(state, b, max_nodes))
        return as_trees([state.root(b) for b in range(state.batch_size)], drafts)

    def similarities(self, features: Tensor) -> Tensor:
        """``[S]`` cosines of one scene ``[I]`` with those remembered, oldest first; NaN for answers without.

        Raises:
            ValueError: features of another width than those remembered, or none that are finite.
        """
        with self._lock:
            return torch.from_numpy(self._store.similarities(self._aligned(_row(features))))

    # ---------------------------------------------------------------- learning

    def observe(self, tokens: Sequence[int], question: Sequence[int] = ()) -> None:
        """Learns an answer about a scene that is not known."""
        self._remember(None, None, tokens, question)

    def remember(
        self, features: Tensor, tokens: Sequence[int], question: Sequence[int] = (), *, aligned: bool = False
    ) -> None:
        """Learns an answer about a scene.

        Args:
            features: ``[I]``, as a call would give them.
            tokens, question: as for :meth:`CorpusDrafter.observe`.
            aligned: these are features ``[D]`` of the target, which the adapter does not see.

        Raises:
            ValueError: features that do not fit those remembered, or tokens as for ``observe``.
        """
        row = _row(features)
        self._remember(_key(row), row if aligned else self._aligned(row), tokens, question)

    def learn(self, state: DraftState) -> None:
        """Learns a call's answers, each about its row's scene."""
        for b, (scene, index) in enumerate(self._scenes(state)):
            key, features = scene or (None, None)
            answer, question = state.answers[b], state.question(b)
            self._remember(key, features, answer, question)
            if index is not None:
                index.add_done_callback(partial(_observe, answer, question))

    def _remember(
        self, key: int | None, features: np.ndarray | None, tokens: Sequence[int], question: Sequence[int]
    ) -> None:
        answer = Answer(token_ids("tokens", tokens).copy(), question_hash(question))
        if not len(answer.tokens):
            return
        with self._lock:
            self._store.add(key, features, answer)
        self.corpus.observe(tokens, question)

    # ---------------------------------------------------------------- scenes

    def _scenes(self, state: DraftState) -> list[_Row]:
        """Per row its scene, and the index that drafts for it."""
        known = state.memory.get(id(self))
        if known is None:
            features = self._given(state)
            known = [_Row(None, None)] * state.batch_size
            if features is not None:
                scenes = [(_key(row), self._aligned(row)) for row in map(_row, features)]
                known = [_Row(scene, self._index_of(*scene)) for scene in scenes]
            state.memory[id(self)] = known
        return known

    def _given(self, state: DraftState) -> Tensor | None:
        given: Mapping[str, Any] | None = state.draft_inputs
        if isinstance(state.events, Mapping):
            given = state.events
        elif state.events is not None and self.takes_events:
            given = self.see(state.events)
        features = None if given is None else given.get(FEATURES)
        if features is None:
            return None
        if (
            not isinstance(features, Tensor)
            or features.dim() != 2
            or len(features) not in (1, state.batch_size)
        ):
            found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{FEATURES} must be a tensor [B={state.batch_size}, I], got {found}")
        return features.expand(state.batch_size, -1)

    @torch.no_grad()
    def _aligned(self, row: np.ndarray) -> np.ndarray:
        if self.adapter is None:
            return row
        weight = next(self.adapter.parameters())
        x = torch.from_numpy(row)[None].to(weight.device, weight.dtype)
        return self.adapter(x)[0].float().cpu().numpy()

    def _index_of(self, key: int, features: np.ndarray) -> Future[CorpusDrafter] | None:
        # In Python an index takes a second to learn what a native one learns in 25 ms.
        if native.cpu is None:
            return None
        with self._lock:
            index = self._indexes.get(key)
            if index is None:
                index = self._indexes[key] = self._made(self._store.nearest(features, self.nearest_tokens))
            self._indexes.move_to_end(key)
            while len(self._indexes) > _INDEXES:
                self._indexes.popitem(last=False)
        return index

    def _made(self, answers: list[Answer]) -> Future[CorpusDrafter]:
        def make() -> CorpusDrafter:
            index = CorpusDrafter(self.corpus.max_tokens)
            index.replace(content_of(answers, self.corpus.content().gates))
            return index

        if self._worker is not None:
            return self._worker.submit(make)
        made: Future[CorpusDrafter] = Future()
        made.set_result(make())
        return made

    # ---------------------------------------------------------------- content

    def __len__(self) -> int:
        """Number of scenes remembered, answers without a scene counted one by one."""
        return len(self._store)

    def __bool__(self) -> bool:
        return True  # an empty drafter is still a drafter

    def save(self, path: str | PathLike[str]) -> None:
        """Writes features and answers to a safetensors file; questions are stored as hashes.

        Raises:
            FileNotFoundError, IsADirectoryError: ``path`` is in no existing directory, or is one.
        """
        with self._lock:
            arrays = self._store.arrays()
        write_arrays(path, {**arrays, "gates": self.corpus.content().gates}, FORMAT)

    def load(self, path: str | PathLike[str]) -> SceneMemory:
        """Replaces the content by that of a file written by :meth:`save`; returns this object.

        Raises:
            ValueError: the file is not a saved SceneMemory, or its arrays do not fit together.
            FileNotFoundError: there is no such file.
        """
        arrays = read_arrays(path, {**KINDS, "gates": (np.float32, 1)}, FORMAT, "SceneMemory")
        store = SceneStore(self.corpus.max_tokens)
        try:
            self.corpus.replace(content_of(store.fill(arrays), arrays["gates"]))
        except ValueError as error:
            raise ValueError(f"path {str(path)!r}: {error}") from None
        with self._lock:
            self._store = store
            self._indexes.clear()
        return self


def pooled_events(model: Any, processor: Any) -> Callable[[list[EventStream], Any], Tensor]:
    """An ``encode`` for :class:`SceneMemory`: an EventGPT's vision tower, averaged over pictures and tokens.

    Args:
        model: the EventGPT.
        processor: its ``EventGptProcessor``.
    """

    @torch.no_grad()
    def encode(streams: list[EventStream], size: Any) -> Tensor:
        pixels = processor.pixels(streams, event_size=size).to(model.device)
        tokens = model.model.visual_tower(pixels.flatten(0, 1)).last_hidden_state
        return tokens.unflatten(0, pixels.shape[:2]).mean((1, 2))

    return encode


def _observe(answer: Sequence[int], question: Sequence[int], index: Future[CorpusDrafter]) -> None:
    index.result().observe(answer, question)


def _row(features: Tensor) -> np.ndarray:
    """``[I]`` as float32 on the CPU."""
    if not isinstance(features, Tensor) or features.dim() != 1 or not features.numel():
        found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"features must be a tensor [I] of one scene, got {found}")
    row = features.detach().float().cpu().numpy()
    if not np.isfinite(row).all():
        raise ValueError("features hold numbers that are not finite")
    return row


def _key(row: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8, person=b"scene").digest(), "little")
