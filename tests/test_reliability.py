"""What goes wrong around a call: drafters raise, memory runs out, Ctrl-C, threads, a thousand calls."""

from __future__ import annotations

import gc
import logging
import random
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_drafters import OracleChainDrafter, OracleDrafter, RandomTreeDrafter
from tiny_models import random_prompts, tiny_llama, tiny_video_llava, video_inputs
from torch import Tensor

import specfuse
from specfuse.drafters import CombinedDrafter, CorpusDrafter, Drafter, DraftState, PromptLookupDrafter
from specfuse.exclusive import exclusive
from specfuse.passes.kv_cache import TreeCacheLayer
from specfuse.stats import GenerationStats
from specfuse.tree import TokenTree

MODEL = tiny_llama(seed=3, eos=False)
INPUTS = random_prompts(MODEL, 2, seed=1)
PLAIN = MODEL.generate(**INPUTS, max_new_tokens=24)
ANSWERS = PLAIN[:, INPUTS["input_ids"].shape[1] :].tolist()


class Failing(OracleChainDrafter):
    """Right until its n-th proposal, which raises; so does ``observe`` where asked to."""

    def __init__(self, error: Exception, fails_at: int, observing: bool = False):
        super().__init__(ANSWERS, depth=3)
        self.error, self.fails_at, self.observing = error, fails_at, observing
        self.calls = self.observed = 0

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        self.calls += 1
        if self.calls == self.fails_at:
            raise self.error
        return super().propose(state, max_nodes)

    def observe(self, tokens: Any, question: Any = ()) -> None:
        self.observed += 1
        if self.observing:
            raise self.error


def generate(drafter: Drafter | None, **kwargs: Any) -> tuple[Tensor, GenerationStats]:
    generator = specfuse.SpeculativeGenerator(MODEL, drafter, max_nodes=kwargs.pop("max_nodes", 8))
    sequences = generator.generate(**INPUTS, max_new_tokens=24, **kwargs)
    assert generator.last_stats is not None
    return sequences, generator.last_stats


# ------------------------------------------------------------------ drafters that raise


@pytest.mark.parametrize(
    ("error", "fails_at"),
    [(RuntimeError("boom"), 1), (KeyError("gone"), 2), (ValueError("later"), 3), (AssertionError(), 4)],
    ids=lambda value: type(value).__name__,
)
def test_a_drafter_that_raises_costs_speed_only(
    error: Exception, fails_at: int, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = Failing(error, fails_at)
    with caplog.at_level(logging.DEBUG, "specfuse"):
        sequences, stats = generate(drafter)
    assert torch.equal(sequences, PLAIN)
    assert stats.drafting_stopped == f"drafter Failing raised {type(error).__name__}: {error}"
    assert stats.as_dict()["drafting_stopped"] == stats.drafting_stopped
    assert drafter.calls == fails_at and drafter.observed == 0, "it is left alone for the rest of the call"
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    traces = [r for r in caplog.records if r.exc_info]
    assert len(warnings) == 1 and "Failing" in warnings[0].getMessage()
    assert len(traces) == 1 and traces[0].levelno == logging.DEBUG
    # The next call asks it again.
    sequences, stats = generate(drafter)
    assert torch.equal(sequences, PLAIN) and stats.drafting_stopped is None
    assert stats.tokens_per_pass > 2 and drafter.observed == 2


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_value_error_of_the_first_two_proposals_is_the_callers(fails_at: int) -> None:
    with pytest.raises(ValueError, match="no events given"):
        generate(Failing(ValueError("no events given"), fails_at))


def test_what_observe_raises_does_not_cost_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    sequences, stats = generate(Failing(RuntimeError("full"), fails_at=0, observing=True))
    assert torch.equal(sequences, PLAIN)
    assert stats.drafting_stopped == "drafter Failing raised RuntimeError: full once it was over"
    assert len(caplog.records) == 1


# ------------------------------------------------------------------ memory that runs out


def out_of_memory_beyond(monkeypatch: pytest.MonkeyPatch, slots: int, error: Exception) -> list[int]:
    """Lets caches hold ``slots`` slots; returns what was asked for, in order."""
    asked: list[int] = []
    allocate = TreeCacheLayer._allocate

    def limited(like: Tensor, capacity: int) -> Tensor:
        asked.append(capacity)
        if capacity > slots:
            raise error
        return allocate(like, capacity)

    monkeypatch.setattr(TreeCacheLayer, "_allocate", staticmethod(limited))
    monkeypatch.setattr("specfuse.run.RESERVED_ANSWER", 0)
    return asked


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_cache_that_can_not_double_grows_by_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    needed = PLAIN.shape[1] + 8
    asked = out_of_memory_beyond(monkeypatch, needed, error)
    sequences, stats = generate(OracleDrafter(ANSWERS, vocab=128))
    assert torch.equal(sequences, PLAIN) and stats.drafting_stopped is None
    assert max(asked) > needed, "doubling was tried"


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("slots_left", [1, 4])
def test_where_a_tree_no_longer_fits_the_answer_goes_on_without_drafts(
    monkeypatch: pytest.MonkeyPatch, error: Exception, slots_left: int
) -> None:
    out_of_memory_beyond(monkeypatch, PLAIN.shape[1] - 1 + slots_left, error)
    sequences, stats = generate(RandomTreeDrafter(vocab=128, seed=1), max_nodes=16)
    assert torch.equal(sequences, PLAIN)
    assert str(stats.drafting_stopped).startswith("memory ran out in a pass over ")


def test_where_the_tree_does_not_fit_behind_the_prompt_the_prompt_goes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out_of_memory_beyond(monkeypatch, 10**6, MemoryError())
    update = TreeCacheLayer.update

    def limited(self: TreeCacheLayer, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if INPUTS["input_ids"].shape[1] < keys.shape[2] and self is self.cache.layers[1]:
            raise MemoryError
        return update(self, keys, values, *args, **kwargs)

    monkeypatch.setattr(TreeCacheLayer, "update", limited)
    sequences, stats = generate(OracleChainDrafter(ANSWERS, depth=4))
    assert torch.equal(sequences, PLAIN) and stats.drafting_stopped is not None


def test_memory_that_is_short_even_without_drafts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_beyond(monkeypatch, PLAIN.shape[1] - 10, MemoryError())
    with pytest.raises(MemoryError):
        generate(None)
    monkeypatch.undo()
    assert torch.equal(generate(None)[0], PLAIN)


# ------------------------------------------------------------------ Ctrl-C

PACKAGE = Path(specfuse.__file__).parent


def interrupted_at(line: int, call: Callable[[], Any]) -> bool:
    """Runs ``call``; the n-th line of the package that is executed raises KeyboardInterrupt, like Ctrl-C."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return None
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_ctrl_c_anywhere_leaves_model_cache_and_drafter_usable() -> None:
    model = tiny_video_llava(seed=5, layers=1)
    inputs = video_inputs(model, frames=2, seed=2)
    expected = model.generate(**inputs, max_new_tokens=6)
    drafter = CombinedDrafter([CorpusDrafter(), PromptLookupDrafter()])
    drafter.needs_target = True
    cache = specfuse.VisionCache()
    before = set(vars(model))
    chance = random.Random(0)
    line, interruptions = 1, 0
    while True:
        with specfuse.patched(model, cache):
            if not interrupted_at(
                line, lambda: specfuse.generate(model, drafter, **inputs, max_new_tokens=6, max_nodes=4)
            ):
                break
            interruptions += 1
        assert set(vars(model)) == before and not model.get_decoder()._forward_hooks
        assert cache.nbytes == sum(entry.nbytes for entry in cache._entries.values()) <= cache.max_bytes
        assert exclusive(model).acquire(blocking=False), "no lock is left behind"
        exclusive(model).release()
        line += chance.randint(1, line // 10 + 4)
    assert interruptions > 40
    with specfuse.patched(model, cache):
        assert torch.equal(specfuse.generate(model, drafter, **inputs, max_new_tokens=6), expected)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), expected)


# ------------------------------------------------------------------ threads


def in_threads(work: list[Callable[[], None]]) -> None:
    failures: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class Overlaps(CombinedDrafter):
    """Notices when two calls are in the loop at once."""

    inside = 0
    worst = 0

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        if not any(state.answers):
            Overlaps.inside += 1
            Overlaps.worst = max(Overlaps.worst, Overlaps.inside)
        return super().propose(state, max_nodes)

    def learn(self, state: DraftState) -> None:
        Overlaps.inside -= 1
        super().learn(state)


def test_threads_that_share_a_generator_take_turns_and_get_their_own_answers() -> None:
    generator = specfuse.SpeculativeGenerator(MODEL, Overlaps([CorpusDrafter(), PromptLookupDrafter()]))
    requests = [random_prompts(MODEL, 1, seed=seed, text_lens=[4 + seed]) for seed in range(6)]
    expected = [MODEL.generate(**request, max_new_tokens=12) for request in requests]

    def ask(index: int) -> Callable[[], None]:
        def call() -> None:
            for shift in range(3):
                i = (index + shift) % len(requests)
                assert torch.equal(generator.generate(**requests[i], max_new_tokens=12), expected[i])

        return call

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        in_threads([ask(index) for index in range(6)])
    finally:
        sys.setswitchinterval(interval)
    assert Overlaps.worst == 1 and Overlaps.inside == 0


def test_a_stopping_criterion_may_ask_the_same_model() -> None:
    inner: list[Tensor] = []

    def asks(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        inner.append(specfuse.generate(MODEL, None, **INPUTS, max_new_tokens=2))
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    sequences, _ = generate(None, stopping_criteria=[asks])
    assert torch.equal(sequences, PLAIN)
    assert torch.equal(inner[0], PLAIN[:, : INPUTS["input_ids"].shape[1] + 2])


# ------------------------------------------------------------------ a thousand calls


@pytest.mark.slow
def test_a_thousand_calls_leave_nothing_behind() -> None:
    model = tiny_video_llava(seed=5, layers=1)
    chance = random.Random(1)
    cache = specfuse.patch(model, specfuse.VisionCache(max_bytes=200_000))
    drafters: list[Any] = [
        None,
        CombinedDrafter([CorpusDrafter(max_tokens=2000), PromptLookupDrafter()]),
        specfuse.ModelDrafter(tiny_llama(seed=1, layers=1), depth=3),
        RandomTreeDrafter(vocab=126),
    ]

    def one() -> None:
        batch = chance.randint(1, 4)
        inputs = video_inputs(
            model,
            batch,
            frames=2,
            seed=chance.randrange(5),
            text_lens=[chance.randint(2, 20) for _ in range(batch)],
        )
        options = {"max_new_tokens": chance.randint(1, 24), "do_sample": chance.random() < 0.3}

        def call() -> Any:
            return specfuse.generate(model, chance.choice(drafters), **inputs, **options, seed=3)

        if chance.random() < 0.2:
            interrupted_at(chance.randint(1, 3000), call)
        else:
            call()

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
        return tracemalloc.get_traced_memory()[0], tensors

    for _ in range(200):
        one()
    tracemalloc.start()
    for _ in range(100):
        one()
    bytes_before, tensors_before = held()
    for _ in range(700):
        one()
    bytes_after, tensors_after = held()
    tracemalloc.stop()
    assert cache.nbytes <= cache.max_bytes
    assert tensors_after <= tensors_before + 40, f"{tensors_before} tensors became {tensors_after}"
    assert bytes_after < bytes_before + 300_000, f"{bytes_before} bytes became {bytes_after}"
