"""How likely the target chooses a draft, given the cosine of the states behind it and the draft probability.

Small models with their numbers in a JSON file; which one is used is decided on clips it was not fitted on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT, VERSION = "specfuse agreement", 1
FILE = "calibration.json"
KINDS = ("constant", "draft", "cosine", "both", "table")
TABLE_BINS = 5  # of the cosine, as full as each other
RIDGE = 1e-5
FOLDS = 4
EDGE = 1e-4
"""Estimates lie between this and 1 less this: no finite sample shows more."""


class Observations(NamedTuple):
    """M places where a drafter proposed a likeliest token and the target chose one."""

    cosine: np.ndarray  # [M] float64, of the adapted drafter state and the target's
    draft: np.ndarray  # [M] float64, the drafter's probability of its token
    agreed: np.ndarray  # [M] bool, whether the target chose that token
    groups: np.ndarray  # [M] int64, the clip or prompt of each: held out as a whole

    def take(self, where: np.ndarray) -> Observations:
        """Some of them."""
        return Observations(*(values[where] for values in self))


@dataclass
class AgreementModel:
    """P(the target chooses the draft | cosine c, draft probability q), q clipped to [EDGE, 1 - EDGE]::

        constant   sigmoid(w0)
        draft      sigmoid(w0 + w1 l)                                l = log(q / (1 - q))
        cosine     sigmoid(w0 + w1 c + w2 c^2 + w3 c^3)              may rise and fall
        both       sigmoid(w0 + w1 l + w2 c + w3 c^2 + w4 c l)       may rise and fall in c
        table      by fifths of c a staircase that rises with q (isotonic regression)

    Args:
        kind: one of ``KINDS``.
        weights: of the logistic kinds, in the order above.
        edges: of the table's inner bins of c, ascending.
        steps: of the table, per bin ascending q and the estimate from there on.
        about: where it comes from, and how it did on held-out clips.

    Source: Platt scaling and isotonic regression, Niculescu-Mizil and Caruana, "Predicting Good Probabilities
    with Supervised Learning", ICML 2005.
    """

    kind: str
    weights: list[float] = field(default_factory=list)
    edges: list[float] = field(default_factory=list)
    steps: list[tuple[list[float], list[float]]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "table":
            sound = len(self.steps) == len(self.edges) + 1 and self.edges == sorted(self.edges)
            for starts, values in self.steps if sound else []:
                sound &= len(starts) == len(values) > 0 and starts == sorted(starts)
                sound &= all(0 <= value <= 1 for value in values)
            numbers = [*self.edges, *(n for step in self.steps for part in step for n in part)]
        else:
            numbers, sound = (
                self.weights,
                len(self.weights) == _columns(self.kind, _NOTHING, _NOTHING).shape[1],
            )
        if not sound or not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"the numbers of a {self.kind!r} model are missing or do not fit together")

    def estimate(self, cosine: np.ndarray, draft: np.ndarray) -> np.ndarray:
        """``[M]`` float64 chances of agreement; 0 where a cosine or a probability is NaN."""
        cosine, draft = np.asarray(cosine, np.float64), np.asarray(draft, np.float64)
        known = np.isfinite(cosine) & np.isfinite(draft)
        c, q = np.where(known, cosine, 0.0), np.where(known, draft, 0.5)
        if self.kind == "table":
            chance, bins = np.zeros(len(c)), np.searchsorted(self.edges, c, side="right")
            for number, (starts, values) in enumerate(self.steps):
                there = bins == number
                place = np.searchsorted(starts, q[there], side="right") - 1
                chance[there] = np.asarray(values)[place.clip(min=0)]
        else:
            chance = _sigmoid(_columns(self.kind, c, q) @ np.asarray(self.weights))
        return np.where(known, chance.clip(EDGE, 1 - EDGE), 0.0)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes ``calibration.json`` into an existing directory."""
        path = Path(directory) / FILE
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> AgreementModel:
        """Reads ``calibration.json`` of a directory.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is broken, of another kind or version, or its numbers do not fit together.
        """
        path = Path(directory) / FILE
        if not path.is_file():
            raise FileNotFoundError(2, "no calibration; specfuse align calibrate makes one", str(path))
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise ValueError(f"it is {content['format']!r}, version {content['version']!r}")
            steps = [([*map(float, a)], [*map(float, b)]) for a, b in content["steps"]]
            weights, edges = ([float(n) for n in content[name]] for name in ("weights", "edges"))
            return cls(content["kind"], weights, edges, steps, dict(content["about"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is no calibration or is broken: {error}") from None


def fit(kind: str, seen: Observations) -> AgreementModel:
    """A model of one kind from at least one observation; those with NaN are left out.

    Raises:
        ValueError: an unknown kind, or nothing observed.
    """
    seen = seen.take(np.isfinite(seen.cosine) & np.isfinite(seen.draft))
    if not len(seen.agreed):
        raise ValueError("observations must hold at least one place, got none")
    if kind == "table":
        edges = np.unique(np.quantile(seen.cosine, np.arange(1, TABLE_BINS) / TABLE_BINS))
        bins = np.searchsorted(edges, seen.cosine, side="right")
        steps = [_isotonic(seen.take(bins == number), seen.agreed.mean()) for number in range(len(edges) + 1)]
        return AgreementModel(kind, edges=edges.tolist(), steps=steps)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return AgreementModel(kind, weights=_logistic(_columns(kind, seen.cosine, seen.draft), seen.agreed))


def choose(seen: Observations, kinds: Sequence[str] = KINDS) -> tuple[AgreementModel, dict[str, float]]:
    """The kind with the lowest log loss on clips left out in turn, fitted on all; and every kind's log loss.

    Raises:
        ValueError: fewer clips than two.
    """
    every = np.unique(seen.groups)
    folds = min(FOLDS, len(every))
    if folds < 2:
        raise ValueError(f"observations must come from at least 2 clips, got {len(every)}")
    fold_of = np.searchsorted(every, seen.groups) % folds
    losses = {}
    for kind in kinds:
        chance = np.zeros(len(seen.agreed))
        for fold in range(folds):
            out = fold_of == fold
            left_out = seen.take(out)
            chance[out] = fit(kind, seen.take(~out)).estimate(left_out.cosine, left_out.draft)
        losses[kind] = log_loss(chance, seen.agreed)
    return fit(min(losses, key=lambda kind: losses[kind]), seen), losses


def log_loss(chance: np.ndarray, agreed: np.ndarray) -> float:
    """Mean negative log-likelihood in nats."""
    return float(-np.mean(np.log(np.where(agreed, chance, 1 - chance).clip(min=1e-12))))


def _logistic(columns: np.ndarray, agreed: np.ndarray) -> list[float]:
    """Weights of a logistic regression by damped Newton steps, with a little ridge."""
    y, scale = agreed.astype(np.float64), np.sqrt(len(agreed))
    # In an orthogonal basis: the powers of a cosine are nearly one another's multiples.
    q, r = np.linalg.qr(columns)
    x, weights = q * scale, np.zeros(columns.shape[1])
    ridge = RIDGE * len(y) * np.eye(len(weights))
    ridge[0, 0] = 1e-9 * len(y)

    def loss(w: np.ndarray) -> float:
        return float(np.logaddexp(0, np.where(agreed, -(x @ w), x @ w)).sum() + w @ ridge @ w / 2)

    for _ in range(50):
        p = _sigmoid(x @ weights)
        curvature = (x * (p * (1 - p) + 1e-9)[:, None]).T @ x + ridge
        step, now = np.linalg.solve(curvature, x.T @ (p - y) + ridge @ weights), loss(weights)
        while loss(weights - step) > now and np.abs(step).max() > 1e-9:
            step /= 2
        weights = weights - step
        if np.abs(step).max() < 1e-7:
            break
    return (np.linalg.pinv(r) @ weights * scale).tolist()


def _isotonic(seen: Observations, overall: float) -> tuple[list[float], list[float]]:
    """Where a rising staircase of agreement over q has its steps, and their heights.

    One place of the overall agreement is added to every step: few places prove little.
    """
    order = np.argsort(seen.draft, kind="stable")
    blocks: list[list[float]] = []  # start, agreed, count
    for q, agreed in zip(seen.draft[order].tolist(), seen.agreed[order].tolist(), strict=True):
        blocks.append([q, float(agreed), 1.0])
        while len(blocks) > 1 and blocks[-2][1] * blocks[-1][2] >= blocks[-1][1] * blocks[-2][2]:
            _, more, count = blocks.pop()
            blocks[-1][1] += more
            blocks[-1][2] += count
    if not blocks:
        return [0.0], [float(overall)]
    heights = [(agreed + overall) / (count + 1) for _, agreed, count in blocks]
    return [start for start, _, _ in blocks], np.maximum.accumulate(heights).tolist()


_NOTHING = np.zeros(0)


def _columns(kind: str, cosine: np.ndarray, draft: np.ndarray) -> np.ndarray:
    """``[M, W]`` what a logistic kind weighs."""
    q = draft.clip(EDGE, 1 - EDGE)
    one, odds, c = np.ones_like(q), np.log(q / (1 - q)), cosine
    columns = {
        "constant": (one,),
        "draft": (one, odds),
        "cosine": (one, c, c**2, c**3),
        "both": (one, odds, c, c**2, c * odds),
    }
    return np.stack(columns[kind], axis=1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.clip(-60, 60)))
