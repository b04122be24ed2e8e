"""Hidden states that drafters are shown: those of a plain forward, with and without a cached prefix."""

from __future__ import annotations

import threading

import pytest
import torch
from scripted_drafters import OracleDrafter
from tiny_models import random_prompts, tiny_llama, tiny_qwen2, tiny_video_llava, video_inputs

import specfuse
from specfuse.drafters import Drafter, DraftState
from specfuse.hf.cache_names import GENERATE_CACHE, output_cache


class Listener(Drafter):
    """Drafts what another drafter does and keeps what it was shown."""

    needs_target = True

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        self.state: DraftState | None = None

    def propose(self, state: DraftState, max_nodes: int):
        assert state.hidden, "asked for a tree before the target has run"
        self.state = state
        return self.drafter.propose(state, max_nodes)


def states_of(state: DraftState, row: int) -> torch.Tensor:
    """Everything that was shown of a row after the prompt, in order: ``[T, D]``."""
    return torch.cat([states[row, : counts[row]] for states, counts in state.hidden])


def check_states(model, state: DraftState, inputs) -> None:
    """Compares what a drafter last saw with one plain forward over prompt and answer."""
    pads = (inputs["attention_mask"] == 0).sum(1).tolist()
    for row, answer in enumerate(state.answers):
        ids = torch.cat([inputs["input_ids"][row, pads[row] :], torch.tensor(answer)])[None]
        pixels = {k: v[row : row + 1] for k, v in inputs.items() if k.startswith("pixel")}
        with torch.no_grad():
            whole = model(input_ids=ids, **pixels, output_hidden_states=True).hidden_states[-1][0]
        prompt = ids.shape[1] - len(answer)
        seen = states_of(state, row)
        assert 0 < len(seen) <= len(answer)
        torch.testing.assert_close(seen, whole[prompt - 1 :][: len(seen)], atol=2e-4, rtol=1e-4)
        before = state.prompt_hidden[row]
        known = min(len(before), prompt - 1)
        torch.testing.assert_close(
            before[len(before) - known :], whole[prompt - 1 - known : prompt - 1], atol=2e-4, rtol=1e-4
        )


def oracle(model, inputs, **options) -> tuple[Listener, torch.Tensor]:
    """A drafter that knows the answer among random tokens, and what ``model.generate`` returns."""
    plain = model.generate(**inputs, do_sample=False, **options)
    right = plain[:, inputs["input_ids"].shape[1] :].tolist()
    return Listener(OracleDrafter(right, 126, seed=3)), plain


MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "video": tiny_video_llava}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_states_are_those_of_a_plain_forward(kind, batch):
    model = MODELS[kind](seed=1, eos=False)
    inputs = video_inputs(model, batch) if kind == "video" else random_prompts(model, batch)
    drafter, plain = oracle(model, inputs, max_new_tokens=14)
    fast = specfuse.generate(model, drafter, **inputs, max_new_tokens=14, do_sample=False)
    assert torch.equal(plain, fast)
    check_states(model, drafter.state, inputs)
    assert drafter.state.prompt_hidden.shape[1] == inputs["input_ids"].shape[1] - 1
    assert any(max(counts) > 1 for _, counts in drafter.state.hidden), "no draft was accepted"


def test_a_cached_clip_leaves_the_states_of_the_text():
    model = tiny_video_llava(seed=1, eos=False)
    inputs = video_inputs(model, 1)
    drafter, plain = oracle(model, inputs, max_new_tokens=14)
    with specfuse.patched(model):
        for computed in (inputs["input_ids"].shape[1] - 1, 5):
            fast = specfuse.generate(model, drafter, **inputs, max_new_tokens=14, do_sample=False)
            assert torch.equal(plain, fast)
            assert drafter.state.prompt_hidden.shape[1] == computed
            state = drafter.state
    check_states(model, state, inputs)


def test_a_given_cache_leaves_the_states_of_what_is_new():
    model = tiny_llama(seed=2, eos=False)
    inputs = random_prompts(model, 1, text_lens=[12])
    drafter, plain = oracle(model, inputs, max_new_tokens=10)
    with torch.no_grad():
        past = output_cache(model(inputs["input_ids"][:, :9], use_cache=True))
    options = {"max_new_tokens": 10, "do_sample": False, GENERATE_CACHE: past}
    assert torch.equal(plain, specfuse.generate(model, drafter, **inputs, **options))
    assert drafter.state.prompt_hidden.shape[1] == 3
    check_states(model, drafter.state, inputs)


def test_states_of_other_threads_are_not_mixed_in():
    model = tiny_llama(seed=3, eos=False)
    inputs = random_prompts(model, 1)
    drafter, plain = oracle(model, inputs, max_new_tokens=8)
    mine = threading.get_ident()

    def interrupt(module, arguments) -> None:
        if threading.get_ident() == mine:
            other = threading.Thread(target=lambda: model(torch.tensor([[9, 8, 7]])))
            other.start()
            other.join()

    handle = model.lm_head.register_forward_pre_hook(interrupt)
    fast = specfuse.generate(model, drafter, **inputs, max_new_tokens=8, do_sample=False)
    handle.remove()
    assert torch.equal(plain, fast)
    check_states(model, drafter.state, inputs)


def test_who_does_not_ask_is_shown_nothing():
    model = tiny_llama(seed=2, eos=False)
    inputs = random_prompts(model, 1)
    drafter, _ = oracle(model, inputs, max_new_tokens=6)
    drafter.needs_target = False
    seen = []
    drafter.propose = lambda state, n: seen.append(state) or drafter.drafter.propose(state, n)
    specfuse.generate(model, drafter, **inputs, max_new_tokens=6, do_sample=False)
    assert seen[-1].answers[0] and not seen[-1].hidden and seen[-1].prompt_hidden is None
