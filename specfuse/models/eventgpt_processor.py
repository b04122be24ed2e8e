"""EventGPT's inputs: an event stream is rendered to pictures, a prompt gets room for their features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from specfuse.events import EventStream, render_eventgpt
from specfuse.models.eventgpt import EventGptConfig

EVENT_TOKEN = "<event>"
CONVERSATION = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions. "
    "USER: <ev_start><event><ev_end>\n{question} ASSISTANT:"
)
"""The published model's prompt, its ``eventgpt_v1`` conversation."""


class EventGptProcessor(ProcessorMixin):
    """Tokenizer and CLIP image processor of an EventGPT.

    Args:
        image_processor: a ``CLIPImageProcessor``.
        tokenizer: one that knows ``event_token`` as a single token.
        num_event_images: n, the pictures of a stream.
        event_tokens: n + P, the features of a stream.
        context_length: tokens of a prompt at most.
        conversation: the prompt around a question, with ``{question}`` and one ``<event>``.
        event_token: how a prompt marks the place of the events.

    Raises:
        ValueError: a tokenizer without the token, or a conversation without a question or a place for events.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_event_images: int = 5,
        event_tokens: int = 582,
        context_length: int = 2048,
        conversation: str = CONVERSATION,
        event_token: str = EVENT_TOKEN,
        **kwargs: Any,
    ):
        ids = tokenizer(event_token, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(f"tokenizer must know {event_token!r} as one token, it makes {len(ids)} of it")
        if "{question}" not in conversation or conversation.count(event_token) != 1:
            raise ValueError(f"conversation must hold {{question}} and one {event_token}: {conversation!r}")
        self.event_token, self.event_token_id = event_token, ids[0]
        self.num_event_images, self.event_tokens = num_event_images, event_tokens
        self.context_length, self.conversation = context_length, conversation
        super().__init__(image_processor, tokenizer, **kwargs)

    def prompt(self, question: str) -> str:
        """A question in the model's conversation, with the place for events."""
        return self.conversation.replace("{question}", question)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        events: EventStream | Sequence[EventStream] | None = None,
        event_images: np.ndarray | Sequence[np.ndarray] | Sequence[Sequence[np.ndarray]] | None = None,
        event_size: tuple[int, int] | str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of the model.

        Args:
            text: B prompts, with one ``<event>`` for each stream.
            events: S streams, in the order of the prompts' ``<event>``.
            event_images: their pictures instead: n of ``[H, W, 3]`` uint8 for each stream.
            event_size: of the pictures that streams are rendered to: ``(height, width)``, None for the
                sensor's, ``"infer"`` as the original implementation does.
            **kwargs: of the tokenizer; tensors are returned unless ``return_tensors`` says otherwise.

        Returns:
            ``input_ids``, ``attention_mask`` ``[B, T]`` (padded on the left, cut at ``context_length``) and
            ``pixel_values_events`` ``[S, n, 3, H, W]``, each where its input was given.

        Raises:
            ValueError: neither text nor events, both streams and pictures, another number of pictures, or
                prompts with another number of places.
        """
        if events is not None and event_images is not None:
            raise ValueError("give events or event_images, not both")
        if text is None and events is None and event_images is None:
            raise ValueError("give text, events or event_images")
        tensors = kwargs.pop("return_tensors", "pt")
        data: dict[str, Any] = {}
        streams = 0
        if events is not None or event_images is not None:
            pixels = self.pixels(events, event_images, event_size)
            data["pixel_values_events"], streams = pixels, len(pixels)
        if text is not None:
            data = self._tokens([text] if isinstance(text, str) else list(text), streams, kwargs) | data
        return BatchFeature(data, tensor_type=tensors)

    def pixels(
        self, events: Any = None, event_images: Any = None, event_size: tuple[int, int] | str | None = None
    ) -> Tensor:
        """``[S, n, 3, H, W]`` float32, normalised; arguments as for a call."""
        if events is not None:
            streams = [events] if isinstance(events, EventStream) else list(events)
            for stream in streams:
                if not isinstance(stream, EventStream):
                    raise ValueError(f"events must be EventStreams (specfuse.events.load), got {stream!r}")
            event_images = [render_eventgpt(s, self.num_event_images, event_size) for s in streams]
        elif np.ndim(event_images[0]) == 3:
            event_images = [event_images]
        if any(len(pictures) != self.num_event_images for pictures in event_images):
            counts = [len(pictures) for pictures in event_images]
            raise ValueError(f"event_images must be {self.num_event_images} for each stream, got {counts}")
        flat = [picture for pictures in event_images for picture in pictures]
        pixels = self.image_processor(flat, return_tensors="pt", input_data_format="channels_last")[
            "pixel_values"
        ]
        return pixels.unflatten(0, (len(event_images), self.num_event_images))

    def _tokens(self, texts: list[str], streams: int, options: dict[str, Any]) -> dict[str, Any]:
        places = sum(text.count(self.event_token) for text in texts)
        if places != streams:
            raise ValueError(f"text has {places} {self.event_token} for {streams} streams of events")
        filled = [text.replace(self.event_token, self.event_token * self.event_tokens) for text in texts]
        rows = [ids[: self.context_length] for ids in self.tokenizer(filled, **options)["input_ids"]]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        return {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values_events"]


AutoProcessor.register(EventGptConfig, EventGptProcessor)
