"""EventDrafter: an EventGPT that sees the scene's events drafts for a model that sees its frames."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specfuse.drafters.base import DraftState
from specfuse.drafters.model import ModelDrafter, left_padded
from specfuse.drafters.scenes import SceneFeatures
from specfuse.events import EventStream
from specfuse.models.eventgpt import EventGptForConditionalGeneration


class EventDrafter(ModelDrafter):
    """Drafts with an EventGPT: events go to it, frames to the target, each with its own features and cache.

    A call says which events: ``events=`` a stream, the path of an event file, a list with one for each row,
    or what :meth:`see` returned; or here as ``inputs``. A stream is encoded once, for any number of
    questions. The drafter's prompt is the target's, with the events where the target has its frames.

    Args:
        model: the EventGPT.
        processor: its ``EventGptProcessor``.
        tokenizer: the target's tokenizer, or its processor; what its ids mean is compared with the drafter's.
        inputs: as from :meth:`see`, for every call without events of its own.
        depth, branching, vocabulary, overlap: as for :class:`ModelDrafter`.

    Raises:
        ValueError: a model that is no EventGPT, or as for :class:`ModelDrafter`.
    """

    takes_events = True

    def __init__(
        self,
        model: EventGptForConditionalGeneration,
        processor: Any,
        tokenizer: Any,
        *,
        inputs: Mapping[str, Tensor] | None = None,
        depth: int = 5,
        branching: int = 1,
        vocabulary: str = "auto",
        overlap: bool = False,
    ):
        if not isinstance(model, EventGptForConditionalGeneration):
            raise ValueError(f"model must be an EventGptForConditionalGeneration, got {type(model).__name__}")
        super().__init__(
            model,
            inputs=inputs,
            depth=depth,
            branching=branching,
            tokenizer=processor.tokenizer,
            target_tokenizer=tokenizer,
            vocabulary=vocabulary,
            overlap=overlap,
        )
        self.target_begin = getattr(tokenizer, "tokenizer", tokenizer).bos_token_id
        self.processor = processor
        self.scenes = SceneFeatures(self._encode)

    @torch.no_grad()
    def see(
        self, events: Any = None, event_images: Any = None, event_size: tuple[int, int] | str | None = None
    ) -> dict[str, Tensor]:
        """The features of S scenes ``[S, n + P, D]``, for ``events`` of a call: one row of the batch each.

        Arguments as for ``EventGptProcessor``: streams, or pictures of them; a path is a file of events. What
        was seen before, the same stream object or an unchanged file, is not encoded again.

        Raises:
            FileNotFoundError, ValueError: as :func:`specfuse.events.load`; both events and pictures, or none.
        """
        if (events is None) == (event_images is None):
            raise ValueError("give either events or event_images")
        if event_images is not None:
            return {"event_features": self._features(self.processor.pixels(None, event_images))}
        scenes = [events] if isinstance(events, EventStream | str | os.PathLike) else list(events)
        return {"event_features": self.scenes.of(scenes, event_size)}

    def _encode(self, streams: list[EventStream], size: Any) -> Tensor:
        return self._features(self.processor.pixels(streams, event_size=size))

    def _features(self, pixels: Any) -> Tensor:
        if not isinstance(pixels, Tensor):
            raise ValueError(
                f"pixel_values_events must be a tensor [S, n, 3, H, W], got {type(pixels).__name__}"
            )
        return self.model.get_event_features(pixels.to(self.model.device))

    def own_inputs(self, state: DraftState) -> dict[str, Any]:
        """The target's prompts with events for frames, or the caller's ``input_ids``.

        Raises:
            ValueError: no events, or of another number of rows than the target has.
        """
        given = self._given(state)
        if "input_ids" in given:
            return given
        features = given.get("event_features")
        if features is None:
            if given.get("pixel_values_events") is None:
                raise ValueError(
                    "EventDrafter needs events: pass events=... with the call; draft_inputs hold "
                    f"{sorted(given) or 'nothing'}"
                )
            features = self._features(given["pixel_values_events"])
        sizes = (self.model.config.event_tokens, self.model.config.text_config.hidden_size)
        shape = tuple(features.shape) if isinstance(features, Tensor) else ()
        if shape[1:] != sizes:
            raise ValueError(
                f"event_features must be a tensor [B={state.batch_size}, {sizes[0]}, {sizes[1]}], "
                f"got {shape or type(features).__name__}"
            )
        if len(features) == 1:
            features = features.expand(state.batch_size, -1, -1)
        if len(features) != state.batch_size:
            raise ValueError(f"events hold {len(features)} streams for {state.batch_size} rows")
        rows = [self._prompt(prompt, state.visual_token_ids) for prompt in state.prompts]
        return left_padded(rows, self.model.device) | {"event_features": features}

    def _given(self, state: DraftState) -> dict[str, Any]:
        """The call's events, else what it gives to drafters, else the drafter's own."""
        if isinstance(state.events, Mapping):
            return dict(state.events)
        if state.events is not None:
            return dict(self.see(state.events))
        return dict(state.draft_inputs if state.draft_inputs is not None else self.inputs or {})

    def _prompt(self, prompt: list[int], visual: frozenset[int]) -> list[int]:
        """A prompt of the target with the events where its first frame is, or at the start of its text."""
        config = self.model.config
        start = int(prompt[:1] == [self.target_begin])
        place = next((i for i, token in enumerate(prompt) if token in visual), start)
        after = [token for token in prompt[place:] if token not in visual]
        seen = [config.event_token_index] * config.event_tokens
        return self.vocabulary.prompt(prompt[:place]) + seen + self.vocabulary.prompt(after)
