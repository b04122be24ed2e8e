"""Rows that a head learns from: what the target said, and its hidden states while it said it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specfuse.hf.cache_names import OUTPUT_CACHE
from specfuse.train.batches import generator, prompt_end, prompt_start
from specfuse.train.clip_store import Clips
from specfuse.train.language import Features, repeat_cache, start_cache
from specfuse.train.outputs import Output

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, VideoLlavaForConditionalGeneration

EventFeatures = Callable[[Sequence[int]], Tensor]
"""Clips of the world, by index, to their event features ``[C, K, D]``."""


class HeadRows(NamedTuple):
    """M rows of text behind the video, T tokens with padding on the right."""

    tokens: Tensor  # [M, T] int64: question, answer
    states: Tensor  # [M, T - 1, D] float32: the target's, before its language-model head, at all but the last
    first: Tensor  # [M] int64: where the answer begins
    lengths: Tensor  # [M] int64
    events: Tensor | None  # [M, K, D] float32


class Teacher:
    """The target, frozen: its states for its own outputs, computed once and kept in half precision.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        clips: with the frames of every clip that outputs are about.
        outputs: what the model said.
        events: event features of clips, where the head is to be given some.
    """

    def __init__(
        self,
        model: VideoLlavaForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        clips: Clips,
        outputs: Sequence[Output],
        events: EventFeatures | None = None,
    ):
        self.model = model
        self._start = prompt_start(tokenizer)
        self._features = Features(model.model.video_tower, clips)
        self._positions = {int(clip): position for position, clip in enumerate(clips.indices)}
        self._texts: dict[int, list[tuple[list[int], int]]] = {}
        for output in outputs:
            asked = prompt_end(tokenizer, output.question)
            # A head drafts behind the first token; shorter answers have nothing to learn from.
            if len(output.tokens) > 1:
                self._texts.setdefault(output.clip, []).append((asked + output.tokens, len(asked)))
        self.clips = list(self._texts)
        self._states: dict[int, list[Tensor]] = {}
        self._events = events
        self._kept_events: dict[int, Tensor] = {}

    def at(self, seed: int, step: int, clips: int, rows: int) -> HeadRows:
        """The batch of a step: ``rows`` answers about each of ``clips`` clips; depends on seed and step."""
        draw = generator(seed, 4, step)
        chosen = []
        for place in draw.integers(len(self.clips), size=clips).tolist():
            clip = self.clips[place]
            count = len(self._texts[clip])
            chosen += [(clip, row) for row in draw.choice(count, rows, replace=count < rows).tolist()]
        return self._rows(chosen)

    def about(self, clip: int) -> HeadRows:
        """Every answer about one clip of the world."""
        return self._rows([(clip, row) for row in range(len(self._texts[clip]))])

    def _rows(self, chosen: list[tuple[int, int]]) -> HeadRows:
        for clip in {clip for clip, _ in chosen} - self._states.keys():
            self._states[clip] = self._read(clip)
        texts = [self._texts[clip][row] for clip, row in chosen]
        device = self.model.device
        tokens = pad_sequence([torch.tensor(tokens) for tokens, _ in texts], batch_first=True)
        states = pad_sequence([self._states[clip][row].float() for clip, row in chosen], batch_first=True)
        events = None
        if self._events is not None:
            events = torch.stack([self.events_of(clip) for clip, _ in chosen]).to(device)  # type: ignore[misc]
        return HeadRows(
            tokens.to(device),
            states.to(device),
            torch.tensor([first for _, first in texts], device=device),
            torch.tensor([len(tokens) for tokens, _ in texts], device=device),
            events,
        )

    @torch.no_grad()
    def _read(self, clip: int) -> list[Tensor]:
        """States ``[T - 1, D]`` of every answer about a clip; its video is read once."""
        texts = [tokens[:-1] for tokens, _ in self._texts[clip]]
        features = self._features.live([self._positions[clip]])
        cache = repeat_cache(start_cache(self.model, self._start, features), len(texts))
        ids = pad_sequence([torch.tensor(tokens) for tokens in texts], batch_first=True)
        # Padding is on the right, where causal attention does not look.
        states = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(ids.to(self.model.device)),
            **{OUTPUT_CACHE: cache},
            use_cache=True,
        ).last_hidden_state
        return [row[: len(tokens)].half().cpu() for row, tokens in zip(states, texts, strict=True)]

    def events_of(self, clip: int) -> Tensor | None:
        """Event features ``[K, D]`` of one clip of the world, where the head is given some."""
        if self._events is None:
            return None
        if clip not in self._kept_events:
            self._kept_events[clip] = self._events([clip])[0].float().cpu()
        return self._kept_events[clip]
