"""The competitors of each input, with the weights that ship or with what was recorded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from bench_drafters import Sees
from transformers import LlamaConfig, LlamaForCausalLM

from end_to_end.systems import PLAIN, Specfuse, System, assisted, hugging_face
from specfuse.data import miniature
from specfuse.drafters import CombinedDrafter, CorpusDrafter, Drafter, HeadDrafter, PromptLookupDrafter
from specfuse.drafters.event import EventDrafter
from specfuse.models import checkpoint

Nodes = Sequence[int | str]


def auto() -> CombinedDrafter:
    """What ``drafter="auto"`` is, with nothing remembered."""
    return CombinedDrafter([CorpusDrafter(), PromptLookupDrafter()])


def replayed_lineup(model: Any, nodes: Nodes, compiled: bool) -> list[System]:
    """Drafters whose drafts follow from the recorded answers alone.

    A drafter that is a model is not among them: what it would draft for these answers was not recorded.
    """
    first, without = nodes[0], []
    if model.device.type == "cuda":
        for name, make in ((PLAIN, lambda: None), (named("corpus, earlier answers", first), CorpusDrafter)):
            without.append(Specfuse(f"{name}, no graphs", model, make, first, remembers=True, graphs=False))
    corpus = [
        Specfuse(named("corpus, earlier answers", size), model, CorpusDrafter, size, remembers=True)
        for size in nodes
    ]
    others = [
        Specfuse(named(name, size), model, make, size, remembers=name == "auto, earlier answers")
        for name, make in (
            ("lookup", PromptLookupDrafter),
            ("auto, nothing remembered", auto),
            ("auto, earlier answers", auto),
        )
        for size in nodes[:2]
    ]
    return [
        *hugging_face(model, compiled),
        Specfuse(PLAIN, model, lambda: None),
        *others[:-2],
        *corpus,
        *others[-2:],
        *without,
    ]


def miniature_lineup(model: Any, processor: Any, nodes: Nodes, compiled: bool) -> list[System]:
    """Drafters with the shipped weights; one whose weights do not ship is left out."""
    ships = miniature.shipped()
    theirs = hugging_face(model, compiled)
    # The best drafter there is, if it were handed the video.
    theirs.append(assisted("HF assisted, a copy of the target, blind", model, copy.deepcopy(model)))
    found: list[System] = [Specfuse(PLAIN, model, lambda: None)]

    def add(name: str, make: Any, sizes: Nodes = nodes[:2], sees: Any = None) -> None:
        for size in sizes:
            found.append(Specfuse(named(name, size), model, make, size, sees=sees and Sees(sees)))

    add("lookup", PromptLookupDrafter)
    add("corpus, nothing remembered", CorpusDrafter)
    parts: list[Drafter] = []
    if "tiny-head" in ships:
        parts = [HeadDrafter.from_pretrained(miniature.directory("tiny-head"), model)]
        add("head", lambda: parts[0])
    if "tiny-eventgpt" in ships:
        eventgpt = checkpoint.load_eventgpt(miniature.directory("tiny-eventgpt"), dtype=torch.float32)
        drafter = EventDrafter(*eventgpt, processor)
        add("EventGPT", lambda: drafter, sees=drafter)
        blind = language_model(eventgpt[0], model)
        theirs.append(assisted("HF assisted, EventGPT's decoder, blind", model, blind))
    if "tiny-corpus" in ships:
        add("corpus, answers on training clips", miniature.load_corpus, nodes)
        drafters = [PromptLookupDrafter(), *parts]
        add("combined", lambda: CombinedDrafter([miniature.load_corpus(), *drafters]))
    return theirs + found


def named(drafter: str, nodes: int | str) -> str:
    """The row of a drafter and a tree size."""
    return f"specfuse, {drafter}, {nodes} nodes"


def language_model(source: Any, target: Any) -> LlamaForCausalLM:
    """The language model of a vision-language model as a text model with the target's vocabulary."""
    text = source.config.get_text_config().to_dict()
    size = target.config.get_text_config().vocab_size
    config = LlamaConfig(**{**text, "vocab_size": size})
    model = LlamaForCausalLM(config).eval().to(target.device, target.dtype)
    weights = {f"model.{name}": value for name, value in source.get_decoder().state_dict().items()}
    weights["lm_head.weight"] = source.get_output_embeddings().weight
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        # What stands beyond the target's vocabulary are placeholders for events.
        weights[name] = weights[name][:size]
    model.load_state_dict(weights)
    model.generation_config = target.generation_config
    return model
