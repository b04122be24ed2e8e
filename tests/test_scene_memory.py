"""SceneMemory: nearer scenes draft, the target's tokens stay, and what it remembers can be kept in a file."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import random_prompts, tiny_llama
from torch import Tensor

import specfuse
from specfuse.adapters import LinearAdapter, LinearAdapterConfig
from specfuse.data.world import events
from specfuse.drafters import CombinedDrafter, CorpusDrafter, DraftState, PromptLookupDrafter, SceneMemory
from specfuse.drafters.scene_memory import FEATURES, pooled_events
from specfuse.drafters.scene_store import Answer, SceneStore
from specfuse.ops import native

needs_native = pytest.mark.skipif(native.cpu is None, reason="an index for each scene needs native code")
QUESTION = [7, 8]
GREEDY = {"max_new_tokens": 24, "do_sample": False}


def scene(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def state(features: Tensor | None, *answers: list[int], given: Any = None) -> DraftState:
    rows = len(answers)
    return DraftState(
        prompts=[QUESTION] * rows,
        answers=[list(answer) for answer in answers],
        active=[True] * rows,
        remaining=[20] * rows,
        draft_inputs=given if features is None else {FEATURES: features},
    )


def chain(memory: SceneMemory, features: Tensor | None, nodes: int = 3) -> list[int]:
    return memory.propose(state(features, [1]), nodes).tokens[0, 1:].tolist()


def two_scenes(**options: Any) -> SceneMemory:
    """A scene where 1 goes on with 10 11 12 and an opposite one, asked about later, with 20 21 22."""
    memory = SceneMemory(**{"background": False, **options})
    for _ in range(3):
        memory.remember(scene(1, 0, 0.1), [1, 10, 11, 12], QUESTION)
    for _ in range(3):
        memory.remember(scene(0, 1, 0.1), [1, 20, 21, 22], QUESTION)
    return memory


@needs_native
def test_the_nearest_scene_drafts() -> None:
    memory = two_scenes()
    assert chain(memory, scene(0.9, 0.2, 0)[None]) == [10, 11, 12]
    assert chain(memory, scene(0.2, 0.9, 0)[None]) == [20, 21, 22]
    assert chain(memory, None) == [20, 21, 22], "without features what was seen last"
    seen = memory.similarities(scene(2, 0, 0))
    torch.testing.assert_close(
        seen,
        torch.nn.functional.cosine_similarity(
            torch.stack([scene(1, 0, 0.1), scene(0, 1, 0.1)]), scene(2, 0, 0)[None]
        ),
    )


@needs_native
def test_rows_of_a_batch_have_their_own_scenes() -> None:
    memory = two_scenes()
    tree = memory.propose(state(torch.stack([scene(1, 0, 0), scene(0, 1, 0)]), [1], [1]), 3)
    assert tree.tokens.tolist() == [[1, 10, 11, 12], [1, 20, 21, 22]]
    one = memory.propose(state(scene(1, 0, 0)[None], [1], [1]), 3)
    assert one.tokens.tolist() == [[1, 10, 11, 12]] * 2


@needs_native
def test_a_scene_learns_its_own_answers() -> None:
    memory = two_scenes()
    here = scene(1, 0.2, 0)[None]
    assert 30 not in chain(memory, here, 9)
    memory.learn(state(here, [1, 30, 31, 32]))
    assert set(chain(memory, here, 9)) >= {30, 31, 32}
    assert len(memory) == 3
    assert memory.similarities(here[0])[2] == pytest.approx(1.0)
    assert 30 in chain(memory, scene(1, 0.25, 0)[None], 9), "and other scenes hear of it"


@needs_native
def test_a_call_does_not_wait_for_an_index() -> None:
    memory, start = two_scenes(background=True), threading.Event()
    assert memory._worker is not None
    memory._worker.submit(start.wait)
    here = scene(1, 0.1, 0)[None]
    first = state(here, [1])
    assert memory.propose(first, 3).tokens[0, 1:].tolist() == [20, 21, 22], "as the corpus"
    memory.learn(state(here, [1, 30, 31, 32]))
    start.set()
    memory._worker.submit(int).result()
    assert memory.propose(first, 3).tokens[0, 1:].tolist() == [10, 11, 12]
    assert set(chain(memory, here, 9)) >= {10, 30}, "and it has learned meanwhile"


@needs_native
def test_only_the_nearest_tokens_are_learned() -> None:
    memory = two_scenes(nearest_tokens=12)
    tree = memory.propose(state(scene(1, 0, 0)[None], [1]), 30)
    assert 10 in tree.tokens and 20 not in tree.tokens
    assert 20 in two_scenes().propose(state(scene(1, 0, 0)[None], [1]), 30).tokens


@needs_native
def test_an_adapter_brings_scenes_known_by_video_and_by_events_together() -> None:
    adapter = LinearAdapter(LinearAdapterConfig(in_features=2, features=3))
    with torch.no_grad():
        adapter.linear.weight.copy_(torch.tensor([[0.0, 1], [1, 0], [0, 0]]))
        adapter.linear.bias.zero_()
    memory = SceneMemory(adapter=adapter, background=False)
    memory.remember(scene(1, 0, 0), [1, 10, 11, 12], QUESTION, aligned=True)
    memory.remember(scene(1, 0), [1, 20, 21, 22], QUESTION)  # lies at (0, 1, 0)
    assert chain(memory, scene(0, 1)[None]) == [10, 11, 12]
    assert chain(memory, scene(1, 0.1)[None]) == [20, 21, 22]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("combined", [False, True])
def test_tokens_are_the_targets(rows: int, combined: bool) -> None:
    model = tiny_llama(eos=False)
    inputs = random_prompts(model, rows)
    plain = model.generate(**inputs, **GREEDY)
    features = torch.eye(4)[:rows]
    memory = SceneMemory()
    drafter = CombinedDrafter([memory, PromptLookupDrafter()]) if combined else memory
    generator = specfuse.SpeculativeGenerator(model, drafter)
    passes = []
    for _ in range(2):
        assert torch.equal(generator.generate(draft_inputs={FEATURES: features}, **inputs, **GREEDY), plain)
        passes.append(generator.last_stats.passes)
    assert passes[1] < passes[0] / 2, "it remembers"
    assert len(memory) == rows, "each row's answer is its scene's"
    memory.remember(features[0], list(range(3, 40)))  # wrong answers change nothing either
    assert torch.equal(generator.generate(draft_inputs={FEATURES: features}, **inputs, **GREEDY), plain)


def test_events_are_encoded_once() -> None:
    asked = []

    def encode(streams: list[Any], size: Any) -> Tensor:
        asked.append(len(streams))
        return torch.tensor([[float(len(s)), float(s.p.sum()), 1.0] for s in streams])

    model, memory = tiny_llama(), SceneMemory(encode)
    inputs = random_prompts(model)
    stream, plain = events(1, 16, 8), model.generate(**inputs, **GREEDY)
    for form in (stream, [stream], memory.see(stream)):
        assert torch.equal(specfuse.generate(model, memory, events=form, **inputs, **GREEDY), plain)
    assert asked == [1] and len(memory) == 1
    with pytest.raises(ValueError, match="SceneMemory takes no events"):
        specfuse.generate(model, SceneMemory(), events=stream, **inputs, **GREEDY)
    with pytest.raises(ValueError, match="has no encode"):
        SceneMemory().see(stream)


def test_pooled_events_are_what_adapters_learn_from() -> None:
    from specfuse.data import miniature
    from specfuse.models.checkpoint import load_eventgpt
    from specfuse.train.adapter_features import drafter_tokens

    model, processor = load_eventgpt(miniature.directory("tiny-eventgpt-naive"), dtype=torch.float32)
    streams = [events(1, 64, 8), events(2, 64, 8)]
    pooled = pooled_events(model, processor)(streams, None)
    pictures = np.stack([specfuse.events.render_eventgpt(stream) for stream in streams])
    torch.testing.assert_close(pooled, drafter_tokens(model, pictures).mean((1, 2)), rtol=1e-4, atol=1e-4)


def test_save_and_load(tmp_path: Path) -> None:
    memory = two_scenes()
    memory.observe([1, 40, 41, 42], QUESTION)
    memory.save(tmp_path / "scenes.safetensors")
    loaded = SceneMemory(background=False).load(tmp_path / "scenes.safetensors")
    for features in (scene(1, 0, 0)[None], scene(0, 1, 0)[None], None):
        assert chain(loaded, features, 9) == chain(memory, features, 9)
    assert len(loaded) == len(memory) == 3
    loaded.remember(scene(1, 0, 0.1), [1, 50], QUESTION)
    assert len(loaded) == 3, "a scene is known again"
    assert loaded.similarities(scene(1, 0, 0)).isnan().tolist() == [False, True, False]
    SceneMemory().save(tmp_path / "empty.safetensors")
    assert len(two_scenes().load(tmp_path / "empty.safetensors")) == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", np.full((2, 3), np.nan, np.float32), "do not fit together"),
        ("features", np.zeros((1, 3), np.float32), "do not fit together"),
        ("scenes", np.full(6, 2, np.int64), "do not fit together"),
        ("lengths", np.full(6, 3, np.int64), "do not fit together"),
        ("lengths", np.array([0, 8, 4, 4, 4, 4], np.int64), "do not fit together"),
        ("tokens", np.full(24, -1, np.int32), "do not fit together"),
        ("tokens", np.zeros(24, np.int64), "tokens must be one-dimensional"),
        ("gates", np.zeros(3, np.float32), "scenes.safetensors"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, value: np.ndarray, message: str) -> None:
    if name == "gates" and native.cpu is None:
        pytest.skip("the Python index has no gates")
    path = tmp_path / "scenes.safetensors"
    memory = two_scenes()
    memory.save(path)
    save_file({**load_file(path), name: value}, path, {"format": "specfuse scenes 1"})
    with pytest.raises(ValueError, match=message):
        memory.load(path)
    CorpusDrafter().save(path)
    with pytest.raises(ValueError, match=r"was not written by SceneMemory\.save"):
        memory.load(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({FEATURES: torch.zeros(3)}, r"scene_features must be a tensor \[B=2, I\], got \[3\]"),
        ({FEATURES: torch.zeros(3, 4)}, r"got \[3, 4\]"),
        ({FEATURES: [1.0]}, "got list"),
        ({FEATURES: torch.full((2, 3), torch.inf)}, "not finite"),
        ({FEATURES: torch.ones(2, 5)}, "have 5 numbers, those of the scenes remembered 3"),
    ],
)
def test_features_that_do_not_fit(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_scenes().propose(state(None, [1], [1], given=given), 4)
        two_scenes().learn(state(None, [1], [1], given=given))


def test_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="nearest_tokens must be at least 1, got 0"):
        SceneMemory(nearest_tokens=0)
    with pytest.raises(ValueError, match="max_tokens"):
        SceneMemory(max_tokens=0)
    with pytest.raises(ValueError, match="tokens must hold ids"):
        SceneMemory().remember(scene(1), [-1])
    with pytest.raises(ValueError, match="features must be a tensor"):
        SceneMemory().remember(torch.ones(2, 2), [1])


def test_the_store_keeps_its_bounds() -> None:
    store = SceneStore(20)
    for key in range(9):
        store.add(key, np.array([key, 1], np.float32), Answer(np.full(5, key, np.int32), 0))
    assert store.tokens == 20 and len(store) == 4
    store.add(5, np.array([5, 1], np.float32), Answer(np.full(5, 5, np.int32), 0))
    kept = store.nearest(np.array([5, 1], np.float32), 1000)
    assert sorted({int(a.tokens[0]) for a in kept}) == [5, 7, 8] and int(kept[-1].tokens[0]) == 5
    for i in range(9):
        store.add(99, np.array([1, 1], np.float32), Answer(np.full(5, i, np.int32), 0))
    assert store.tokens == 20 and [int(a.tokens[0]) for a in store.nearest(np.ones(2, np.float32), 99)] == [
        *(5, 6, 7, 8)
    ]


def test_threads_share_a_memory() -> None:
    memory, failed = SceneMemory(max_tokens=200), []

    def work(number: int) -> None:
        try:
            for i in range(30):
                features = scene(float(number), float(i), 1)[None]
                memory.propose(state(features, [1]), 8)
                memory.learn(state(features, [1, number + 2, i + 2]))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and memory.corpus.num_tokens <= 200 and 0 < len(memory) <= 67
