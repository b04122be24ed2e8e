"""The benchmark of scene memory: its passes are those of the verification op, its gain has an interval."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from test_benchmarks import module

from specfuse.data.recording import EXAMPLE, Recording, load_recording
from specfuse.drafters import CorpusDrafter
from specfuse.drafters.scene_memory import SceneMemory
from specfuse.replay import replay


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("bench_scene_memory", monkeypatch)


def test_passes_are_those_of_a_replay(bench: ModuleType) -> None:
    recording = load_recording(EXAMPLE)
    recording = Recording(recording.samples[:20], "")
    expected = replay(recording, CorpusDrafter(), 8)
    drafter, passes, questions = CorpusDrafter(), 0, recording.questions
    for sample in recording.samples:
        question = [recording.vocab_size + questions.index(sample.question)]
        passes += bench.passes(drafter, question, list(sample.target), torch.ones(2), 8, True)
    assert passes == expected.passes < expected.tokens


def test_gain_and_interval(bench: ModuleType) -> None:
    rng = np.random.default_rng(1)
    base = np.stack([np.full(30, 60), rng.integers(8, 12, 30)], 1)
    better = np.stack([base[:, 0], base[:, 1] - 2], 1)
    row = bench.compared(better, base)
    assert row["low"] > 0 and row["low"] < row["gain"] < row["high"]
    assert bench.compared(base, base)["gain"] == 0
    noise = bench.compared(np.stack([base[:, 0], rng.permutation(base[:, 1])], 1), base)
    assert noise["low"] < 0 < noise["high"]


def test_ridge_finds_a_linear_map(bench: ModuleType) -> None:
    torch.manual_seed(0)
    source, weight = torch.randn(4000, 6) * 3 + 1, torch.randn(6, 4)
    wanted = source @ weight + 2
    with torch.no_grad():
        error = bench.ridge(source, wanted)(source) - wanted
    assert error.square().mean() < 0.02 * wanted.var()


def test_memory_holds_the_known_scenes_alone(bench: ModuleType) -> None:
    answers = [[([1], [5, scene, scene])] for scene in range(4)]
    features = torch.eye(4)
    world = bench.World(3, answers, features, features, features)
    memory = bench.memory_of(world, bench.View("events", features))
    assert isinstance(memory, SceneMemory) and len(memory) == 3
    figures = bench.play(world, memory, features, [0, 1, 2], 4, False)
    fresh = bench.play(world, memory, features, [3], 1, False)
    assert figures.tolist() == [[3, 1]] * 3 and fresh[0, 1] > 1
