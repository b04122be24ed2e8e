"""generator.stream: every answer is that of its request alone, whoever shares the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scripted_drafters import OracleChainDrafter, RandomTreeDrafter
from tiny_models import finish, left_pad, random_prompts, tiny_llama, tiny_video_llava, video_inputs
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import specfuse
from specfuse.drafters import CombinedDrafter, CorpusDrafter, Drafter, DraftState, PromptLookupDrafter
from specfuse.passes.kv_cache import TreeCacheLayer
from specfuse.stream import StreamedAnswer, stacked
from specfuse.tree import TokenTree

MODEL = tiny_llama(seed=3)


def requests_for(model: PreTrainedModel, count: int, **options: Any) -> list[dict[str, Any]]:
    """Text requests of mixed lengths, each with its id, seed and number of tokens."""
    return [
        {
            "id": f"r{i}",
            **random_prompts(model, 1, seed=i, text_lens=[2 + 5 * i % 11]),
            "max_new_tokens": 1 + 7 * i % 23,
            "seed": 100 + i,
            **options,
        }
        for i in range(count)
    ]


def alone(model: PreTrainedModel, requests: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What plain decoding gives each request by itself."""
    return {
        request["id"]: specfuse.generate(model, None, **{k: v for k, v in request.items() if k != "id"})
        for request in requests
    }


def streamed(
    model: PreTrainedModel, drafter: Any, requests: Any, batch_size: int, max_nodes: Any = 8
) -> dict[str, StreamedAnswer]:
    generator = specfuse.SpeculativeGenerator(model, drafter, max_nodes=max_nodes)
    answers = list(generator.stream(requests, batch_size=batch_size))
    found = {answer.id: answer for answer in answers}
    assert len(found) == len(answers)
    return found


def assert_equal(found: dict[str, StreamedAnswer], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, answer in found.items():
        assert answer.error is None and answer.finished
        assert torch.equal(answer.sequences, expected[name]), name  # type: ignore[arg-type]
        assert answer.tokens == expected[name][0, -len(answer.tokens) :].tolist()
        assert answer.stats.tokens == len(answer.tokens)


class ReadsStates(RandomTreeDrafter):
    """Wants the target's states, and checks that it was given as many as tokens."""

    needs_target = True

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        assert sum(counts[0] for _, counts in state.hidden) == len(state.answers[0])
        assert all(states.shape[1] == counts[0] for states, counts in state.hidden)
        return super().propose(state, max_nodes)


DRAFTERS: dict[str, Any] = {
    "none": lambda: None,
    "auto": lambda: CombinedDrafter([CorpusDrafter(), PromptLookupDrafter()]),
    "random": lambda: RandomTreeDrafter(vocab=126, seed=2),
    "model": lambda: specfuse.ModelDrafter(tiny_llama(seed=3), depth=3),
    "states": lambda: ReadsStates(vocab=126, seed=4),
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize(("batch_size", "do_sample"), [(1, False), (2, True), (5, False), (8, True)])
def test_a_stream_answers_as_generate_does_alone(name: str, batch_size: int, do_sample: bool) -> None:
    requests = requests_for(MODEL, 12, do_sample=do_sample)
    found = streamed(MODEL, DRAFTERS[name](), requests, batch_size)
    assert_equal(found, alone(MODEL, requests))


@pytest.mark.parametrize("attention", ["eager", specfuse.register_attention()])
def test_other_attentions_and_sliding_windows(attention: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = Qwen2Config(
        vocab_size=128,
        num_hidden_layers=2,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["full_attention", "sliding_attention"],
        tie_word_embeddings=False,
        **sizes,
    )
    model = finish(Qwen2ForCausalLM(config), 1, torch.float32, eos=False)
    model.set_attn_implementation(attention)
    requests = requests_for(model, 7)
    expected = {r["id"]: model.generate(**{k: r[k] for k in r if k not in ("id", "seed")}) for r in requests}
    assert_equal(streamed(model, RandomTreeDrafter(vocab=126, seed=1), requests, 3), expected)


def test_max_nodes_auto_and_half_precision() -> None:
    model = tiny_llama(seed=5, dtype=torch.float64, eos=False)
    requests = requests_for(model, 9)
    drafter = specfuse.ModelDrafter(tiny_llama(seed=5, eos=False), depth=4)
    assert_equal(streamed(model, drafter, requests, 4, max_nodes="auto"), alone(model, requests))


def test_videos_through_a_patched_model_with_mixed_clips_and_padding() -> None:
    model = tiny_video_llava(seed=5)
    requests = []
    for i in range(9):
        inputs = video_inputs(model, 1, frames=2, seed=i % 3, question_seed=i, text_lens=[3 + i % 4])
        if i % 2:  # left padding that belongs to the request
            pad = {"input_ids": torch.zeros(1, 3), "attention_mask": torch.zeros(1, 3)}
            inputs |= {name: torch.cat([zeros.long(), inputs[name]], dim=1) for name, zeros in pad.items()}
        requests.append({"id": i, **inputs, "max_new_tokens": 3 + 4 * i % 17})
    expected = alone(model, requests)
    for drafter in ("auto", None):
        with specfuse.patched(model) as cache:
            assert_equal(streamed(model, drafter, requests, 4), expected)
        assert cache.stats.misses == 3 and cache.stats.hits == 6, "each clip was encoded once"
        assert_equal(streamed(model, drafter, requests, 4), expected)


class Forces(LogitsProcessor):
    """Makes the n-th token of an answer a given one."""

    def __init__(self, prompt: int, place: int, token: int):
        self.length, self.token = prompt + place, token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self.length:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.token] = 0
        return scores


def test_requests_bring_their_own_settings() -> None:
    model = tiny_llama(seed=3, eos=False)
    requests = requests_for(model, 8, max_new_tokens=12)
    requests[1] |= {"do_sample": True, "temperature": 1.7, "top_k": 20}
    requests[2] |= {"do_sample": True, "top_p": 0.8}
    requests[4] |= {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
    requests[5] |= {"logits_processor": [Forces(requests[5]["input_ids"].shape[1], 1, 9)]}
    requests[6] |= {"stopping_criteria": [lambda ids, scores: torch.tensor([ids.shape[1] > 14])]}
    expected = alone(model, requests)
    assert 9 in expected["r5"][0, requests[5]["input_ids"].shape[1] :]
    for drafter in (None, RandomTreeDrafter(vocab=126), specfuse.ModelDrafter(model, depth=3)):
        assert_equal(streamed(model, drafter, requests, 5), expected)


# ------------------------------------------------------------------ failures


def test_what_is_wrong_with_a_request_stays_with_it() -> None:
    requests = requests_for(MODEL, 8, max_new_tokens=8)
    bad: dict[Any, dict[str, Any]] = {
        "r1": requests[1] | {"num_beams": 2},
        "r3": requests[3] | random_prompts(MODEL, 2, seed=1),
        "r4": requests[4] | {"return_dict_in_generate": True},
        "r6": requests[6] | {"input_ids": torch.tensor([[500, 1]]), "attention_mask": torch.ones(1, 2)},
    }
    given: list[Any] = [bad.get(request["id"], request) for request in requests]
    found = streamed(MODEL, "lookup", [*given, "not a request"], 3)
    texts = {name: str(found[name].error) for name in [*bad, 8]}
    assert "num_beams=2" in texts["r1"] and "has one row, got 2" in texts["r3"]
    assert "return_dict_in_generate" in texts["r4"] and "must be mappings" in texts[8]
    assert isinstance(found["r6"].error, IndexError)
    good = [request for request in requests if request["id"] not in bad]
    assert_equal({r["id"]: found[r["id"]] for r in good}, alone(MODEL, good))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_nan_logits_end_one_request_and_leave_nothing_in_its_row(batch_size: int) -> None:
    model = tiny_llama(seed=3, eos=False)
    poison = 2  # in no prompt
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.nan
        model.lm_head.weight[poison] = 0  # nobody emits it unforced
    requests = requests_for(model, 8, max_new_tokens=14)
    length = requests[2]["input_ids"].shape[1]
    requests[2]["logits_processor"] = [Forces(length, 5, poison)]
    requests[2]["max_new_tokens"] = 30
    found = streamed(model, None, requests, batch_size)
    assert isinstance(found["r2"].error, FloatingPointError) and found["r2"].sequences is None
    assert len(found["r2"].tokens) == 6, "what it had is told"
    good = [request for request in requests if request["id"] != "r2"]
    assert_equal({r["id"]: found[r["id"]] for r in good}, alone(model, good))


class Raises(Drafter):
    """Raises in the proposal of a given number."""

    def __init__(self, error: Exception, at: int):
        self.error, self.at = error, at

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        count = state.memory[id(self)] = state.memory.get(id(self), 0) + 1
        if count == self.at:
            raise self.error
        return TokenTree.from_chains([state.root(0)], [[3, 4]])


def test_drafters_that_raise_are_the_requests_affair() -> None:
    requests = requests_for(MODEL, 4, max_new_tokens=9)
    expected = alone(MODEL, requests)
    found = streamed(MODEL, Raises(RuntimeError("boom"), at=3), requests, 2)
    assert_equal(found, expected)
    stopped = [answer.stats.drafting_stopped for answer in found.values() if len(answer.tokens) > 5]
    assert stopped and all(text is not None and "boom" in text for text in stopped)
    found = streamed(MODEL, Raises(ValueError("no events"), at=2), requests, 2)
    errors = [answer.error for answer in found.values() if expected[answer.id].shape[1] > 20]
    assert errors and all("no events" in str(error) for error in errors)


def test_memory_that_runs_out_ends_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = requests_for(MODEL, 6, max_new_tokens=12)
    expected = alone(MODEL, requests)
    allocate = TreeCacheLayer._allocate
    limit = max(sequences.shape[1] for sequences in expected.values())

    def limited(like: Tensor, capacity: int) -> Tensor:
        if capacity > limit:
            raise MemoryError
        return allocate(like, capacity)

    monkeypatch.setattr(TreeCacheLayer, "_allocate", staticmethod(limited))
    monkeypatch.setattr("specfuse.run.RESERVED_ANSWER", -20)
    found = streamed(MODEL, RandomTreeDrafter(vocab=126, seed=1), requests, 3, max_nodes=16)
    assert_equal(found, expected)
    assert any("memory ran out" in str(answer.stats.drafting_stopped) for answer in found.values())


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, "2"])
def test_a_bad_batch_size_is_named(batch_size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        specfuse.SpeculativeGenerator(MODEL, None).stream([], batch_size=batch_size)


def test_lossy_acceptance_is_refused() -> None:
    generator = specfuse.SpeculativeGenerator(MODEL, None, accept="typical")
    with pytest.raises(ValueError, match="a stream is lossless"):
        generator.stream([])


# ------------------------------------------------------------------ the iterator


def test_requests_are_pulled_when_a_row_is_free_and_only_then() -> None:
    pulled = 0

    def source() -> Iterator[dict[str, Any] | None]:
        nonlocal pulled
        for request in requests_for(tiny_llama(eos=False), 6, max_new_tokens=4):
            pulled += 1
            yield request
            yield None  # none at the moment

    stream = specfuse.SpeculativeGenerator(MODEL, None).stream(source(), batch_size=2)
    assert pulled == 0
    next(stream)
    assert pulled <= 3, "one answer, two rows"
    stream.close()
    assert not stream.rows and stream.pool.kv_bytes == 0
    assert list(stream) == [] and pulled <= 3


def test_an_iterable_that_raises_is_not_swallowed() -> None:
    def source() -> Iterator[dict[str, Any]]:
        yield requests_for(MODEL, 1)[0]
        raise OSError("the queue is gone")

    with pytest.raises(OSError, match="the queue is gone"):
        list(specfuse.SpeculativeGenerator(MODEL, None).stream(source()))


def test_partial_answers_grow_to_the_finished_one() -> None:
    requests = requests_for(MODEL, 5, max_new_tokens=10)
    expected = alone(MODEL, requests)
    drafter = specfuse.ModelDrafter(MODEL, depth=2)
    seen: dict[str, list[int]] = {}
    finished = {}
    for answer in specfuse.SpeculativeGenerator(MODEL, drafter).stream(requests, batch_size=2, partial=True):
        before = seen.get(answer.id, [])
        assert answer.id not in finished and answer.tokens[: len(before)] == before
        seen[answer.id] = answer.tokens
        if answer.finished:
            finished[answer.id] = answer
        else:
            assert answer.sequences is None and len(answer.tokens) > len(before)
    assert_equal(finished, expected)


def test_no_pass_carries_a_finished_row() -> None:
    requests = requests_for(MODEL, 10)
    rows = []
    handle = MODEL.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        found = streamed(MODEL, None, requests, 4)
    finally:
        handle.remove()
    assert max(rows) == 4
    assert sum(rows) == sum(answer.stats.passes for answer in found.values())


def test_a_streamer_gets_its_own_request() -> None:
    class Collects:
        def __init__(self) -> None:
            self.got: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    requests = requests_for(MODEL, 4)
    expected = alone(MODEL, requests)
    streamers = [Collects() for _ in requests]
    given = [request | {"streamer": streamer} for request, streamer in zip(requests, streamers, strict=True)]
    streamed(MODEL, OracleChainDrafter([[3]], depth=1), given, 2)
    for request, streamer in zip(requests, streamers, strict=True):
        assert streamer.ended and streamer.got == expected[request["id"]][0].tolist()


def test_trees_are_stacked_with_their_probabilities_and_taken_apart_again() -> None:
    first = TokenTree.from_parents([[5, 6, 7]], [[-1, 0, 0]], [[1.0, 0.5, 0.25]])
    root = TokenTree.from_parents([[9]], [[-1]])
    both = stacked([first, root])
    both.validate()
    assert both.num_nodes.tolist() == [3, 1] and both.probs is not None
    assert both.probs.tolist() == [[1.0, 0.5, 0.25], [1.0, 0.0, 0.0]]
    assert both.rows([0]).tokens.tolist() == first.tokens.tolist()
    assert stacked([first, TokenTree.from_chains([1], [[2]])]).probs is None, "certainty is not made up"


def test_padding_with_holes_is_left_out() -> None:
    inputs = left_pad([[1, 9, 8, 7, 6, 5, 4, 3]])
    inputs["attention_mask"][0, [0, 3]] = 0
    request = {"id": "holes", **inputs, "max_new_tokens": 8}
    assert_equal(streamed(MODEL, RandomTreeDrafter(vocab=126), [request], 2), alone(MODEL, [request]))


# ------------------------------------------------------------------ rows that finish in a batch


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", ["none", "auto", "random", "model"])
def test_a_batch_drops_rows_that_finish(name: str, do_sample: bool) -> None:
    model = tiny_llama(seed=3, eos=False)
    ends = [3, 40, 9, 5, 22, 4]

    def finishes(ids: Tensor, scores: Any) -> Tensor:
        # A row is told by its first real token.
        real = [int(row[(row != 0).nonzero()[0] + 1]) for row in ids]
        return torch.tensor([ids.shape[1] >= width + ends[starts.index(token)] for token in real])

    inputs = random_prompts(model, 6, seed=1)
    width = inputs["input_ids"].shape[1]
    starts = [int(row[(row != 0).nonzero()[0] + 1]) for row in inputs["input_ids"]]
    assert len(set(starts)) == 6
    options = {
        "max_new_tokens": 40,
        "do_sample": do_sample,
        "eos_token_id": 2,
        "stopping_criteria": [finishes],
    }
    with_dict = {"return_dict_in_generate": True}  # keeps all rows
    expected = specfuse.generate(model, None, **inputs, **options, **with_dict, seed=5).sequences
    rows = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        found = specfuse.generate(model, DRAFTERS[name](), max_nodes=8, **inputs, **options, seed=5)
    finally:
        handle.remove()
    assert torch.equal(found, expected)
    assert rows[0] == 6 and (rows[-1] < 6 or name == "model")
    if name == "none":
        assert rows[-1] == 1 and len(rows) == 40
        if not do_sample:
            assert torch.equal(model.generate(**inputs, **options), expected)
