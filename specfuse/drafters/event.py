"""EventDrafter: an EventGPT that sees the scene's events drafts for a model that sees its frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specfuse.drafters.base import DraftState
from specfuse.drafters.model import ModelDrafter, left_padded
from specfuse.models.eventgpt import EventGptForConditionalGeneration


class EventDrafter(ModelDrafter):
    """Drafts with an EventGPT: events go to it, frames to the target, each with its own features and cache.

    A call says which events: ``draft_inputs=drafter.see(stream)`` (once for a scene, for any number of
    questions), or here as ``inputs``. The drafter's prompt is the target's, with the events where the target
    has its frames.

    Args:
        model: the EventGPT.
        processor: its ``EventGptProcessor``.
        tokenizer: the target's tokenizer, or its processor; what its ids mean is compared.
        inputs: as from :meth:`see`, for every call without ``draft_inputs``.
        depth, branching: as for :class:`ModelDrafter`.

    Raises:
        ValueError: an id means another thing to the target, a model that is no EventGPT, or as for
            :class:`ModelDrafter`.
    """

    def __init__(
        self,
        model: EventGptForConditionalGeneration,
        processor: Any,
        tokenizer: Any,
        *,
        inputs: Mapping[str, Tensor] | None = None,
        depth: int = 5,
        branching: int = 1,
    ):
        if not isinstance(model, EventGptForConditionalGeneration):
            raise ValueError(f"model must be an EventGptForConditionalGeneration, got {type(model).__name__}")
        super().__init__(model, inputs=inputs, depth=depth, branching=branching)
        self.processor = processor
        check_same_tokens(getattr(tokenizer, "tokenizer", tokenizer), processor.tokenizer)

    @torch.no_grad()
    def see(
        self, events: Any = None, event_images: Any = None, event_size: tuple[int, int] | str | None = None
    ) -> dict[str, Tensor]:
        """The features of S streams ``[S, n + P, D]``, as ``draft_inputs``: one row of the batch each.

        Arguments as for ``EventGptProcessor``: streams, or pictures of them.
        """
        if (events is None) == (event_images is None):
            raise ValueError("give either events or event_images")
        pixels = self.processor.pixels(events, event_images, event_size)
        return {"event_features": self.model.get_event_features(pixels.to(self.model.device))}

    def own_inputs(self, state: DraftState) -> dict[str, Any]:
        """The target's prompts with events for frames, or the caller's ``input_ids``.

        Raises:
            ValueError: no events, or of another number of rows than the target has.
        """
        given = dict(state.draft_inputs if state.draft_inputs is not None else self.inputs or {})
        if "input_ids" in given:
            return given
        features = given.get("event_features")
        if features is None:
            if given.get("pixel_values_events") is None:
                raise ValueError(
                    "EventDrafter needs events: pass draft_inputs=drafter.see(stream); draft_inputs hold "
                    f"{sorted(given) or 'nothing'}"
                )
            features = self.model.get_event_features(given["pixel_values_events"].to(self.model.device))
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
            raise ValueError(f"draft_inputs hold {len(features)} streams for {state.batch_size} rows")
        rows = [self._prompt(prompt, state.visual_token_ids) for prompt in state.prompts]
        return left_padded(rows, self.model.device) | {"event_features": features}

    def _prompt(self, prompt: list[int], visual: frozenset[int]) -> list[int]:
        """A prompt of the target with the events where its first frame is, or at the start of its text."""
        config = self.model.config
        start = int(prompt[:1] == [self.processor.tokenizer.bos_token_id])
        place = next((i for i, token in enumerate(prompt) if token in visual), start)
        text = [token if token < config.text_config.vocab_size else 0 for token in prompt]
        after = [token for token, was in zip(text[place:], prompt[place:], strict=True) if was not in visual]
        return text[:place] + [config.event_token_index] * config.event_tokens + after


def check_same_tokens(target: Any, drafter: Any) -> None:
    """Compares what the ids of two tokenizers mean.

    Placeholders and other added tokens of the target may be missing: they do not occur in answers.

    Raises:
        ValueError: names the first token of the target's text that is another id to the drafter.
    """
    added = set(target.get_added_vocab())
    ends = [token for token in (target.bos_token, target.eos_token) if token is not None]
    mine = target.get_vocab()
    its = drafter.get_vocab()
    different = [token for token in (*ends, *mine.keys() - added) if its.get(token) != mine.get(token)]
    if different:
        token = min(different, key=lambda token: mine.get(token, -1))
        raise ValueError(
            f"tokenizer: {len(different)} of the target's {len(mine)} tokens are others to the drafter, "
            f"first {token!r}: {mine.get(token)} to the target, {its.get(token)} to the drafter"
        )
