"""What was said about which scene: features and answers, the oldest scenes leaving first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from specfuse.drafters.corpus import CorpusContent
from specfuse.drafters.corpus_file import Kinds

KINDS: Kinds = {
    "features": (np.float32, 2),  # [S, D] of the scenes that have some, oldest first
    "keys": (np.uint64, 1),  # [S]
    "scenes": (np.int64, 1),  # [A] row of features that an answer belongs to, -1 for none
    "tokens": (np.int32, 1),  # answers one after the other
    "lengths": (np.int64, 1),  # [A]
    "questions": (np.uint64, 1),  # [A]
}
FORMAT = "specfuse scenes 1"


class Answer(NamedTuple):
    """One answer."""

    tokens: np.ndarray  # int32
    question: int  # hash


class _Scene:
    __slots__ = ("answers", "direction", "features", "tokens")

    def __init__(self, features: np.ndarray | None):
        self.features = features  # [D] float32
        self.direction = None if features is None else features / max(float(np.linalg.norm(features)), 1e-12)
        self.answers: list[Answer] = []
        self.tokens = 0


class SceneStore:
    """Scenes in the order of their last answers. Not for several threads at once.

    Args:
        max_tokens: of answers; a scene leaves with all of its answers, and one alone keeps its newest.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self.tokens = 0
        self._scenes: OrderedDict[int, _Scene] = OrderedDict()
        self._unnamed = -1  # keys of scenes without features are below 0
        self._directions: np.ndarray | None = None  # [S, D], made when they are asked for

    def __len__(self) -> int:
        return len(self._scenes)

    @property
    def width(self) -> int | None:
        """D, once there are features."""
        known = (scene.features for scene in reversed(self._scenes.values()))
        return next((len(features) for features in known if features is not None), None)

    def add(self, key: int | None, features: np.ndarray | None, answer: Answer) -> None:
        """One answer about a scene; ``key`` None and features None where it is not known."""
        if features is not None:
            self._check(features)
        if key is None:
            key, self._unnamed = self._unnamed, self._unnamed - 1
        scene = self._scenes.get(key)
        if scene is None:
            scene = self._scenes[key] = _Scene(features)
        self._scenes.move_to_end(key)
        scene.answers.append(answer)
        scene.tokens += len(answer.tokens)
        self.tokens += len(answer.tokens)
        self._directions = None
        self._evict()

    def _evict(self) -> None:
        while self.tokens > self.max_tokens and len(self._scenes) > 1:
            self.tokens -= self._scenes.popitem(last=False)[1].tokens
        for scene in self._scenes.values() if self.tokens > self.max_tokens else ():
            while self.tokens > self.max_tokens and len(scene.answers) > 1:
                gone = len(scene.answers.pop(0).tokens)
                scene.tokens -= gone
                self.tokens -= gone

    def _check(self, features: np.ndarray) -> None:
        width = self.width
        if width is not None and len(features) != width:
            raise ValueError(
                f"scene_features have {len(features)} numbers, those of the scenes remembered {width}"
            )

    def similarities(self, features: np.ndarray) -> np.ndarray:
        """``[S]`` float32 cosines with every scene, NaN for scenes without features."""
        self._check(features)
        if self._directions is None:
            nothing = np.full(len(features), np.nan, np.float32)
            rows = [nothing if s.direction is None else s.direction for s in self._scenes.values()]
            self._directions = np.stack(rows) if rows else np.zeros((0, len(features)), np.float32)
        length = max(float(np.linalg.norm(features)), 1e-12)
        return self._directions @ (features / length)

    def nearest(self, features: np.ndarray, tokens: int) -> list[Answer]:
        """Answers about the nearest scenes, at most so many tokens of them, the nearest scene's last.

        Answers about no known scene count as farther than any; among equals the newest is nearest.
        """
        near = np.nan_to_num(self.similarities(features), nan=-2.0)
        scenes = list(self._scenes.values())
        chosen: list[list[Answer]] = []
        for place in np.argsort(near, kind="stable")[::-1]:
            tokens -= scenes[place].tokens
            if tokens < 0 and chosen:
                break
            chosen.append(scenes[place].answers)
        return [answer for answers in reversed(chosen) for answer in answers]

    # ---------------------------------------------------------------- files

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, as ``KINDS`` says."""
        rows: dict[int, int] = {}
        features, owners, answers = [], [], []
        for key, scene in self._scenes.items():
            if scene.features is not None:
                rows[key] = len(rows)
                features.append(scene.features)
            answers += scene.answers
            owners += [rows.get(key, -1)] * len(scene.answers)
        content = content_of(answers)
        return {
            "features": np.stack(features) if features else np.zeros((0, 0), np.float32),
            "keys": np.array(list(rows), np.uint64),
            "scenes": np.array(owners, np.int64),
            "tokens": content.tokens,
            "lengths": content.lengths,
            "questions": content.scopes,
        }

    def fill(self, arrays: Mapping[str, np.ndarray]) -> list[Answer]:
        """Adds what :meth:`arrays` gave; returns the answers in their order.

        Raises:
            ValueError: the arrays do not fit together.
        """
        features, keys, owners = arrays["features"], arrays["keys"].tolist(), arrays["scenes"]
        lengths, questions = arrays["lengths"], arrays["questions"].tolist()
        fits = (
            len(features) == len(keys) == len(set(keys)) and len(owners) == len(lengths) == len(questions),
            (lengths >= 1).all() and lengths.sum() == len(arrays["tokens"]),
            (arrays["tokens"] >= 0).all() and np.isfinite(features).all(),
            (owners >= -1).all() and (owners < len(features)).all(),
        )
        if not all(fits):
            raise ValueError(f"the arrays do not fit together: {len(features)} scenes, {len(owners)} answers")
        parts = np.split(arrays["tokens"], np.cumsum(lengths)[:-1]) if len(lengths) else []
        answers = [Answer(tokens, question) for tokens, question in zip(parts, questions, strict=True)]
        for owner, answer in zip(owners.tolist(), answers, strict=True):
            if owner < 0:
                self.add(None, None, answer)
            else:
                self.add(keys[owner], features[owner], answer)
        return answers


def content_of(answers: Sequence[Answer], gates: np.ndarray | None = None) -> CorpusContent:
    """Answers as a corpus takes them."""
    tokens = [answer.tokens for answer in answers]
    return CorpusContent(
        np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
        np.array([len(row) for row in tokens], np.int64),
        np.array([answer.question for answer in answers], np.uint64),
        np.zeros(len(answers), np.uint64),
        np.zeros(0, np.float32) if gates is None else gates,
    )
