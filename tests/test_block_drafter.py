"""BlockDrafter: chains from events and the last tokens of the text, and the target's tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import finish

import specfuse
from specfuse.adapters import CompressionDrafter, CompressionDrafterConfig
from specfuse.data.world import clip
from specfuse.drafters.base import DraftState
from specfuse.drafters.block import BlockDrafter
from specfuse.drafters.event import EventDrafter
from specfuse.train.build import build_drafter, build_drafter_processor, build_model, build_processor
from specfuse.train.drafter import drafter_preset
from specfuse.train.presets import preset
from specfuse.train.tokenizer import PROMPT, train_tokenizer

HORIZON, CONTEXT = 5, 4


@pytest.fixture(scope="module")
def eyes() -> EventDrafter:
    tokenizer = train_tokenizer(clip(1).questions, 400)
    tokenizer.add_tokens(["<event>"], special_tokens=True)
    model = finish(build_drafter(drafter_preset(preset("micro")), tokenizer, 0), 1, torch.float32, eos=False)
    return EventDrafter(
        model, build_drafter_processor(model, tokenizer), train_tokenizer(clip(1).questions, 400)
    )


@pytest.fixture(scope="module")
def adapter(eyes: EventDrafter) -> CompressionDrafter:
    torch.manual_seed(3)
    config = CompressionDrafterConfig(
        features=32, vocab_size=400, width=16, layers=1, heads=2, horizon=HORIZON, context=CONTEXT
    )
    made = CompressionDrafter(config)
    with torch.no_grad():
        made.head.weight *= 30  # opinions
    return made


def features(rows: int, eyes: EventDrafter) -> dict[str, torch.Tensor]:
    return {"event_features": torch.randn(rows, eyes.model.config.event_tokens, 32)}


def state_of(prompts: list[list[int]], answers: list[list[int]], given: Any) -> DraftState:
    every = {"active": [True] * len(prompts), "remaining": [9] * len(prompts)}
    return DraftState(prompts, answers, **every, visual_token_ids=frozenset({5}), draft_inputs=given)


def test_a_chain_is_what_the_adapter_says_of_the_text_behind_the_video(eyes, adapter) -> None:
    given = features(3, eyes)
    state = state_of([[1, 9, 5, 5, 7, 8], [1, 5, 6], [1, 5, 6]], [[11, 12, 13], [14], [15]], given)
    state.active[2] = False
    tree = BlockDrafter(adapter, eyes, least=0.0).propose(state, 16)
    # The last four tokens; a short text begins with its first token again.
    expected = adapter.draft(given["event_features"][:2], torch.tensor([[8, 11, 12, 13], [6, 6, 6, 14]]))
    assert tree.num_nodes.tolist() == [1 + HORIZON, 1 + HORIZON, 1] and tree.tokens[:, 0].tolist() == [
        13,
        14,
        15,
    ]
    assert torch.equal(tree.tokens[:2, 1:], expected)
    assert tree.parents[0].tolist() == [-1, 0, 1, 2, 3, 4]
    assert (tree.probs.diff(dim=1)[:2] <= 0).all() and tree.probs[0, 0] == 1
    # No more than there is room for, in the tree or in the answer.
    assert BlockDrafter(adapter, eyes, least=0.0).propose(state, 2).width == 3
    state.remaining = [4, 1, 9]
    assert BlockDrafter(adapter, eyes, least=0.0).propose(state, 16).num_nodes.tolist() == [4, 1, 1]


def test_unlikely_drafts_are_cut_off(eyes, adapter) -> None:
    state = state_of([[1, 5, 6, 7, 8, 9]], [[11]], features(1, eyes))
    whole = BlockDrafter(adapter, eyes, least=0.0).propose(state, 16)
    least = float(whole.probs[0, 2]) - 1e-6
    part = BlockDrafter(adapter, eyes, least=least).propose(state, 16)
    assert part.num_nodes.item() == 1 + int((whole.probs[0, 1:] >= least).sum()) < whole.num_nodes.item()
    assert BlockDrafter(adapter, eyes, least=1.0).propose(state, 16).num_nodes.item() == 1


def test_tokens_are_the_targets(eyes, adapter) -> None:
    tokenizer = train_tokenizer(clip(1).questions, 400)
    target = finish(build_model(preset("micro"), tokenizer, 0), 2, torch.float32, eos=False)
    frames = np.random.default_rng(0).integers(0, 255, (2, 8, 64, 64, 3), dtype=np.uint8)
    text = [PROMPT.format(question=q) for q in ("What is the weather like?", "Is there a car?")]
    inputs = build_processor(tokenizer)(text=text, videos=list(frames), padding=True, return_tensors="pt")
    options = {**inputs, "max_new_tokens": 12, "do_sample": False}
    drafter = BlockDrafter(adapter, eyes, least=0.0)
    fast = specfuse.generate(target, drafter, draft_inputs=features(2, eyes), **options)
    assert torch.equal(fast, target.generate(**options))


def test_what_does_not_fit_is_named(eyes, adapter) -> None:
    with pytest.raises(ValueError, match=r"least must lie in 0 to 1, got 1\.5"):
        BlockDrafter(adapter, eyes, least=1.5)
    other = CompressionDrafter(CompressionDrafterConfig(features=8, vocab_size=9, width=4, heads=2))
    with pytest.raises(ValueError, match="adapter must read features of width 32, got one of 8"):
        BlockDrafter(other, eyes)
    with pytest.raises(ValueError, match="EventDrafter needs events"):
        BlockDrafter(adapter, eyes).propose(state_of([[1, 6]], [[7]], None), 4)
