"""Who is compared: Hugging Face's ways to generate, and specfuse with each drafter, on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import CompileConfig

from specfuse import SpeculativeGenerator, VisionCache, patch
from specfuse.drafters import Drafter
from specfuse.run import visual_token_ids
from specfuse.stats import GenerationStats

LOOKUP_TOKENS = 10
GENERATE, LOOKUP, PLAIN = "model.generate", "HF prompt lookup", "specfuse, no drafter"


@dataclass(frozen=True)
class Asked:
    """One question to all competitors.

    Args:
        clip: number of the clip.
        turn: 0 for the first question about it.
        inputs: of ``model.generate``.
        limit: tokens of the longest answer.
        scored: False where only the first token's time is looked at.
        earlier: answers that were given before this question and are not asked here, with their question:
            drafters that remember are told them, untimed.
        prepare: called before any competitor is asked.
    """

    clip: int
    turn: int
    inputs: Mapping[str, Tensor]
    limit: int
    scored: bool = True
    earlier: Sequence[Sequence[int]] = ()
    prepare: Callable[[], object] = lambda: None

    def question(self, visual: frozenset[int]) -> tuple[int, ...]:
        """The prompt's text."""
        return tuple(token for token in self.inputs["input_ids"][0].tolist() if token not in visual)


class System:
    """A competitor.

    Attributes:
        name: in tables.
        model: whose forward passes are its passes.
        counted: passes are counted by a hook; else they are known.
        stats: of specfuse's last answer.
        attention: implementation that the language model attends with, or None to leave it.
    """

    counted = False
    stats: GenerationStats | None = None
    attention: str | None = None

    def __init__(self, name: str, model: Any):
        self.name, self.model = name, model

    def begin(self) -> None:
        """A new round: nothing is remembered."""

    def before(self, asked: Asked) -> None:
        """What is not timed."""
        if self.attention is not None:
            # Competitors share the weights, and with them the configuration.
            attend(self.model, self.attention)

    def answer(self, asked: Asked, streamer: Any) -> Tensor:
        """The sequence, prompt included."""
        raise NotImplementedError


class HuggingFace(System):
    """``model.generate`` with options of its own."""

    def __init__(self, name: str, model: Any, *, counted: bool = False, **options: Any):
        super().__init__(name, model)
        self.options, self.counted = options, counted

    def answer(self, asked: Asked, streamer: Any) -> Tensor:
        return self.model.generate(
            **asked.inputs,
            **self.options,
            max_new_tokens=asked.limit,
            do_sample=False,
            streamer=streamer,
        )


class Specfuse(System):
    """``specfuse`` with a drafter and a vision cache of its own.

    Args:
        name: in tables.
        model: the target; a shallow copy with the same weights is patched, the model stays as it is.
        make: a drafter that has learned nothing of the questions, for each round.
        nodes: ``max_nodes``.
        remembers: it is told earlier answers.
        sees: makes ``draft_inputs`` of a clip, or None; timed.
        graphs: of ``specfuse.generate``.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        make: Callable[[], Drafter | None],
        nodes: int | str = "auto",
        *,
        remembers: bool = False,
        sees: Any = None,
        graphs: bool | str = "auto",
    ):
        super().__init__(name, copy.copy(model))
        self.make, self.nodes, self.remembers, self.sees = make, nodes, remembers, sees
        self.graphs = graphs
        self.cache: VisionCache = patch(self.model)
        self.visual = visual_token_ids(model)
        self.begin()

    def begin(self) -> None:
        self.cache.clear()
        if self.sees is not None:
            self.sees.seen.clear()
        self.generator = SpeculativeGenerator(
            self.model, self.make(), max_nodes=self.nodes, graphs=self.graphs
        )

    def before(self, asked: Asked) -> None:
        super().before(asked)
        if asked.turn == 0:
            self.cache.clear()  # one clip at a time: a dozen competitors keep one each
        if self.remembers and self.generator.drafter is not None:
            question = asked.question(self.visual)
            for answer in asked.earlier:
                self.generator.drafter.observe(answer, question=question)
        if self.sees is not None:
            self.sees.prepare(asked.clip)

    def answer(self, asked: Asked, streamer: Any) -> Tensor:
        own = None if self.sees is None else self.sees(asked.clip)
        sequences: Any = self.generator.generate(
            **asked.inputs,
            draft_inputs=own,
            max_new_tokens=asked.limit,
            do_sample=False,
            streamer=streamer,
        )
        self.stats = self.generator.last_stats
        return sequences


def attend(model: Any, implementation: str) -> None:
    """Changes how the language model attends, and nothing about the vision tower."""
    model.config.get_text_config()._attn_implementation = implementation


def hugging_face(model: Any, compiled: bool) -> list[System]:
    """model.generate as it is, with a static cache, and prompt lookup.

    Args:
        model: the target.
        compiled: the static cache's decoding under ``torch.compile`` too. On a GPU Hugging Face does that
            unasked.
    """
    static = {"cache_implementation": "static"}
    # Hugging Face's lookup drafts the video's placeholders, which the model then takes for pixels to come.
    hidden = sorted(visual_token_ids(model))
    lookup = {"prompt_lookup_num_tokens": LOOKUP_TOKENS, "suppress_tokens": hidden}
    found: list[System] = [
        HuggingFace(GENERATE, model),
        HuggingFace("HF static cache", model, **static, disable_compile=True),
        HuggingFace(LOOKUP, model, counted=True, **lookup),
    ]
    if compiled:
        settings = CompileConfig()
        settings._compile_all_devices = True
        found.insert(2, HuggingFace("HF static cache, compiled", model, **static, compile_config=settings))
    return found


def assisted(name: str, model: Any, assistant: Any) -> HuggingFace:
    """Hugging Face's assisted generation: the assistant gets the prompt's ids and nothing of the video.

    transformers before 5.18 hands pixels to a text model's ``generate``, which then refuses them; its forward
    does not look at them.
    """
    assistant._validate_model_kwargs = lambda model_kwargs: None
    return HuggingFace(name, model, counted=True, assistant_model=assistant)
