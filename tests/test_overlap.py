"""A draft model that reads its prompt beside the target: the same drafts, one pass later; errors surface."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from test_eventgpt_drafter import QUESTION, asked
from test_eventgpt_drafter import drafter as drafter
from test_eventgpt_drafter import stream as stream
from test_eventgpt_drafter import target as target
from tiny_models import left_pad, tiny_llama

import specfuse
from specfuse import CombinedDrafter, ModelDrafter, PromptLookupDrafter
from specfuse.drafters.beside import Beside
from specfuse.drafters.event import EventDrafter
from specfuse.events import EventStream

INPUTS = left_pad([[5, 6, 7], [8, 9, 10, 11, 12]]) | {"max_new_tokens": 24}


@pytest.mark.parametrize("sampled", [False, True])
def test_the_same_tokens_and_drafts(sampled: bool) -> None:
    model = tiny_llama(seed=1, eos=False)
    options = INPUTS | ({"do_sample": True, "seed": 4} if sampled else {"do_sample": False})
    plain = specfuse.generate(model, None, **options)
    passes = []
    for overlap in (False, True):
        generator = specfuse.SpeculativeGenerator(model, ModelDrafter(model, depth=4, overlap=overlap))
        assert torch.equal(generator.generate(**options), plain)
        assert generator.last_stats.accepted == generator.last_stats.drafted
        passes.append(generator.last_stats.passes)
    # Of two rows, 5 tokens each; without a first tree, one pass gives a row 1.
    assert passes == [10, 12]


def test_it_runs_beside() -> None:
    model, small = tiny_llama(seed=1, eos=False), tiny_llama(seed=2)
    threads = []

    def watched(*_: Any) -> None:
        threads.append(threading.current_thread() is threading.main_thread())
        assert not torch.is_grad_enabled()

    small.model.register_forward_pre_hook(watched)
    both = CombinedDrafter([PromptLookupDrafter(), ModelDrafter(small, depth=2, overlap=True)])
    found = specfuse.generate(model, both, **INPUTS, do_sample=False)
    assert torch.equal(found, model.generate(**INPUTS, do_sample=False))
    assert threads[0] is False and all(threads[1:])


def test_events_beside(drafter: EventDrafter, target: Any, stream: EventStream) -> None:
    tokenizer = drafter.processor.tokenizer
    beside = EventDrafter(drafter.model, drafter.processor, tokenizer, vocabulary="same", overlap=True)
    inputs = asked(target, QUESTION)
    assert torch.equal(specfuse.generate(target, beside, events=stream, **inputs), target.generate(**inputs))
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        specfuse.generate(target, beside, events="absent.npz", **inputs)
    with pytest.raises(ValueError, match="EventDrafter needs events"):
        specfuse.generate(target, beside, **inputs)


def test_what_it_raised_is_raised_where_it_is_asked_for() -> None:
    def fails() -> None:
        raise KeyError("lost")

    beside = Beside(fails, torch.device("cpu"))
    with pytest.raises(KeyError, match="lost"):
        beside.result()
    with torch.autocast("cpu", torch.bfloat16):
        beside = Beside(lambda: torch.ones(2, 2) @ torch.ones(2, 2), torch.device("cpu"))
    assert beside.result().dtype == torch.bfloat16
