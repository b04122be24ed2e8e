"""Stage 2: projector and language model learn to answer, at first on the tower as stage 1 left it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from specfuse.hf.cache_names import OUTPUT_CACHE
from specfuse.train.batches import IGNORED, Rows, generator, pixels, prompt_start, rows
from specfuse.train.build import FRAME_TOKENS, VIDEO_TOKENS
from specfuse.train.clip_store import Clips
from specfuse.train.presets import Preset
from specfuse.train.vision import Read, read_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, VideoLlavaForConditionalGeneration
    from transformers.cache_utils import Cache


class Features:
    """What the frozen tower says about clips: computed when first asked for, then kept in half precision."""

    def __init__(self, tower: torch.nn.Module, clips: Clips, read: Read = read_layer):
        self._tower, self._clips, self._read = tower, clips, read
        self._kept: dict[int, Tensor] = {}

    def live(self, chosen: list[int]) -> Tensor:
        """``[M, F * 65, D]`` of a clip's F frames, with gradients, for positions in the clips."""
        pictures = pixels(self._clips.frames[chosen]).to(next(self._tower.parameters()).device)
        features = self._read(self._tower, pictures.flatten(0, 1))
        return features.unflatten(0, pictures.shape[:2]).flatten(1, 2)

    @torch.no_grad()
    def frozen(self, chosen: list[int]) -> Tensor:
        """The same without gradients, as the tower was when a clip was first asked for."""
        if missing := [clip for clip in chosen if clip not in self._kept]:
            for clip, features in zip(missing, self.live(missing), strict=True):
                self._kept[clip] = features.half()
        return torch.stack([self._kept[clip] for clip in chosen]).float()


def start_cache(model: VideoLlavaForConditionalGeneration, start: list[int], features: Tensor) -> Cache:
    """Keys and values of the start of a prompt, for ``features [M, 520, D]`` of M clips."""
    return read_start(model, start, features)[0]


def read_start(
    model: VideoLlavaForConditionalGeneration,
    start: list[int],
    features: Tensor,
    kept: Tensor | None = None,
) -> tuple[Cache, Tensor]:
    """The same, and what the middle layer holds at the last token of the video ``[M, D]``.

    ``kept``: the video tokens that are read, of 520, in order; the others are left out, which costs less.
    """
    inner = model.model
    ids = torch.tensor(start, device=features.device)
    positions = torch.arange(len(ids), device=features.device)
    if kept is not None:
        places = (ids == model.config.video_token_index).nonzero()[:, 0]
        stays = ids != model.config.video_token_index
        stays[places[kept]] = True
        ids, positions, features = ids[stays], positions[stays], features[:, kept]
    embeddings = inner.get_input_embeddings()(ids).expand(len(features), -1, -1)
    video = ids == model.config.video_token_index
    places = video[None, :, None].expand_as(embeddings)
    video_embeddings = inner.multi_modal_projector(features).to(embeddings.dtype)
    return run_start(inner.language_model, embeddings.masked_scatter(places, video_embeddings), positions)


def run_start(language_model: Any, embeddings: Tensor, positions: Tensor) -> tuple[Cache, Tensor]:
    """Keys and values of prompts' starts ``[M, T, D]``, and what the middle layer holds at their ends."""
    from transformers import DynamicCache

    cache = DynamicCache(config=language_model.config)
    states = language_model(
        inputs_embeds=embeddings,
        position_ids=positions[None],
        **{OUTPUT_CACHE: cache},
        use_cache=True,
        output_hidden_states=True,
    ).hidden_states
    return cache, states[language_model.config.num_hidden_layers // 2][:, -1]


def repeat_cache(cache: Cache, times: int) -> Cache:
    """Every row of a cache ``times`` times in a row; gradients flow back to the one."""
    from transformers import DynamicCache

    repeated = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (x.repeat_interleave(times, 0) for x in (layer.keys, layer.values))
        repeated.update(keys, values, index)
    return repeated


def answer_loss(
    model: VideoLlavaForConditionalGeneration,
    start: list[int],
    features: Tensor,
    text: Rows,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted mean loss over the answers' tokens, and the middle layer at the last token of the video.

    ``text`` has as many rows for each clip, in order.
    """
    once, middle = read_start(model, start, features, kept)
    cache = repeat_cache(once, len(text.ids) // len(features))
    return text_loss(model, cache, len(start), text), middle


def text_loss(model: PreTrainedModel, cache: Cache, start: int, text: Rows) -> Tensor:
    """Weighted mean loss over the answers' tokens, behind starts of ``start`` tokens in ``cache``."""
    states = text_states(model, cache, start, text.ids)
    targets = text.targets.to(states.device)
    said = targets != IGNORED
    losses = cross_entropy(model.lm_head(states[said]).float(), targets[said], reduction="none")
    weights = text.weights.to(states.device)[said]
    return (losses * weights).sum() / weights.sum()


def text_states(model: PreTrainedModel, cache: Cache, start: int, ids: Tensor) -> Tensor:
    """States before the language-model head ``[M, T, D]`` of rows of text behind starts in ``cache``."""
    ids = ids.to(model.device)
    # Padding is on the right, where causal attention does not look.
    states: Tensor = model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(ids),
        position_ids=torch.arange(start, start + ids.shape[1], device=ids.device)[None],
        **{OUTPUT_CACHE: cache},
        use_cache=True,
    ).last_hidden_state
    return states


class LanguageBatches:
    """The batches of stage 2; which one depends on seed and step alone. ``short``: the drafter's answers."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        clips: Clips,
        preset: Preset,
        seed: int,
        short: bool = False,
    ):
        self.start = prompt_start(tokenizer)
        self._tokenizer, self._clips, self._preset, self._seed = tokenizer, clips, preset, seed
        self._short = short

    def at(self, step: int, *, facts_only: bool = False) -> tuple[list[int], Rows]:
        """Positions of the clips of a step, and rows of text about them.

        ``facts_only`` asks more factual questions and leaves out what follows the fact: a short row says as
        much about what is seen as a long one, and costs a fraction.
        """
        preset = self._preset
        count = preset.fact_questions if facts_only else preset.questions
        clips = preset.fact_clips if facts_only else preset.text_clips
        draw = generator(self._seed, 2, step)
        chosen = draw.integers(len(self._clips.indices), size=clips).tolist()
        picked = []
        for clip in chosen:
            asked = [q for q in self._clips.questions[clip] if q.factual or not facts_only]
            places = draw.choice(len(asked), size=count, replace=len(asked) < count)
            picked += [asked[i] for i in places]
        return chosen, rows(self._tokenizer, picked, facts_only=facts_only, short=self._short)

    def kept(self, step: int, share: float) -> Tensor | None:
        """The video tokens that a step reads: all class tokens and more and more patches; None for all.

        What is asked mostly stands in the class tokens. With few patches beside them a step costs a third,
        and the language model finds the class tokens sooner.
        """
        preset = self._preset
        if share >= preset.sparse_share:
            return None
        patches = FRAME_TOKENS - 1
        count = preset.least_patches + int((patches - preset.least_patches) * share / preset.sparse_share)
        draw = generator(self._seed, 3, step)
        frames = [
            [0, *sorted(1 + draw.choice(patches, count, replace=False))]
            for _ in range(VIDEO_TOKENS // FRAME_TOKENS)
        ]
        return torch.tensor([i * FRAME_TOKENS + token for i, tokens in enumerate(frames) for token in tokens])
