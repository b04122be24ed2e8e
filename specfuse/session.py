"""Several questions about one video: it is encoded once, and nothing that was said is computed twice.

session = VideoSession(model, processor, "drive.mp4")
print(session.ask("What is happening?", max_new_tokens=64))
branch = session.fork()                       # shares the conversation so far
print(session.ask("Is it raining?"), branch.ask("How many cars are there?"))
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specfuse.arguments import row_seeds
from specfuse.drafters import Drafter
from specfuse.generate import SpeculativeGenerator
from specfuse.hf.cache_names import CACHE_NAMES, GENERATE_CACHE, cache_argument, output_cache
from specfuse.models import adapter_for
from specfuse.passes.row_pool import RowPool
from specfuse.passes.shared_prefix import SharedPrefix
from specfuse.stats import GenerationStats
from specfuse.stream import AnswerStream
from specfuse.video_prompt import FIRST_TURN, NEXT_TURN, load_frames
from specfuse.vision.fingerprint import ModelFingerprint
from specfuse.vision.prefix_kv import LayerKV

_RESERVED = {
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    *CACHE_NAMES,
    "return_dict_in_generate",
    "video",
    "processor",
    "question",
}


class Answer(str):
    """The text of an answer; it is a `str`.

    Attributes:
        tokens: ids the model emitted for it, end-of-sequence included.
        stats: `GenerationStats` of the call.
    """

    tokens: list[int]
    stats: GenerationStats

    def __new__(cls, text: str, tokens: Sequence[int], stats: GenerationStats) -> Answer:
        """A string that knows its tokens."""
        answer = super().__new__(cls, text)
        answer.tokens = list(tokens)
        answer.stats = stats
        return answer

    def __getnewargs__(self) -> tuple[str, list[int], GenerationStats]:  # type: ignore[override]
        return str(self), self.tokens, self.stats


class VideoSession:
    """A conversation about one video.

    Every answer is the one that `model.generate` gives on the whole conversation so far, uncached. One
    session is for one thread; forks may be used by others.

    Args:
        model: a `VideoLlavaForConditionalGeneration`, patched or not.
        processor: its `VideoLlavaProcessor`.
        video: path of a video file, uint8 RGB frames [T, H, W, 3], or a list of T arrays or PIL images.
        drafter: as for `specfuse.generate`.
        max_nodes: as for `specfuse.generate`.
        num_frames: T when `video` is a path; frames are spread evenly.
        events: what an event camera saw of it, for a drafter that takes events; as for `specfuse.generate`.
        first_turn: template of the first prompt; holds `<video>` and `{question}`.
        next_turn: template of what follows an answer; holds `{question}`.

    Raises:
        ValueError: an unsupported model class, frames of another shape or dtype, a template without its
            parts.
        FileNotFoundError: `video` names no file.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        video: str | os.PathLike[str] | np.ndarray | Tensor | Sequence[Any],
        drafter: Drafter | str | None = "auto",
        max_nodes: int | str = 32,
        *,
        num_frames: int = 8,
        events: Any = None,
        first_turn: str = FIRST_TURN,
        next_turn: str = NEXT_TURN,
    ):
        _check_templates(first_turn, next_turn)
        self.model = model
        self.processor = processor
        self.drafter = drafter
        self.max_nodes = max_nodes
        self.events = events
        self.first_turn, self.next_turn = first_turn, next_turn
        self.history: tuple[tuple[str, Answer], ...] = ()
        self._video = _EncodedVideo(model, load_frames(video, num_frames))
        self._ids: Tensor | None = None  # [1, S] everything said so far
        self._kv: LayerKV = {}  # of all of it but the last token
        self._weights = b""  # what computed it

    def ask(self, question: str, **generate_kwargs: Any) -> Answer:
        """Continues the conversation with a question.

        Args:
            question: plain text.
            **generate_kwargs: as for `specfuse.generate` (`max_new_tokens`, `do_sample`, `streamer`, ...).

        Returns:
            The answer. A call that raises leaves the conversation as it was.

        Raises:
            ValueError: an empty question, one that holds a placeholder of the model, or an argument that the
                session sets itself; everything `specfuse.generate` raises.
        """
        self._check_request(question, generate_kwargs)
        weights = self._video.weights()
        if self._ids is None:
            ids, pixels = self._first_prompt(question)
            kv = self._video.prefix_kv(ids, pixels, weights)
        else:
            ids, kv = self._next_prompt(self._ids, question), self._said_kv(weights)
        generator = SpeculativeGenerator(self.model, self.drafter, max_nodes=self.max_nodes)
        generator.encoded_pixels = self._video.pixels
        output: Any = generator.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{GENERATE_CACHE: _as_cache(kv)},
            return_dict_in_generate=True,
            **{"events": self.events, "tokenizer": self.processor.tokenizer, **generate_kwargs},
        )
        tokens = output.sequences[0, ids.shape[1] :].tolist()
        text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        answer = Answer(text, tokens, output.stats)
        self._ids = output.sequences
        self._kv = _first_slots(output_cache(output), output.sequences.shape[1] - 1)
        # What model.generate decoded alone may have left a cache that only it understands.
        self._weights = weights if output.stats.passes else b""
        self.history += ((question, answer),)
        return answer

    def ask_many(
        self, questions: Sequence[str], *, batch_size: int = 8, seed: Any = None, **generate_kwargs: Any
    ) -> list[Answer]:
        """Asks several questions at once, each as if a fork of its own were asked.

        What was said so far, the video above all, is kept and attended to once for all of them (with sdpa;
        else every row has its copy). The conversation itself does not go on.

        Args:
            questions: plain texts, any number.
            batch_size: how many are answered at a time.
            seed: an int (question i uses ``seed + i``) or one for each.
            **generate_kwargs: as for `ask`, but no `streamer`.

        Returns:
            The answers, in the order of the questions; each is that of ``session.fork().ask(question)``.

        Raises:
            ValueError: as for `ask`; the first question that fails decides.
        """
        if isinstance(questions, str) or not all(isinstance(question, str) for question in questions):
            raise ValueError(f"questions must be a sequence of strings, got {questions!r}")
        if generate_kwargs.get("streamer") is not None:
            raise ValueError("streamer: ask_many has several answers to show, and one streamer has one")
        for question in questions:
            self._check_request(question, generate_kwargs)
        if not questions:
            return []
        seeds = row_seeds(seed, len(questions), bool(generate_kwargs.get("do_sample"))).tolist()
        prompts, kv = self._prompts(questions)
        generator = SpeculativeGenerator(self.model, self.drafter, max_nodes=self.max_nodes)
        generator.encoded_pixels = self._video.pixels
        requests = (
            {
                "id": i,
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                GENERATE_CACHE: _as_cache(kv),
                "seed": seeds[i],
                **{"events": self.events, "tokenizer": self.processor.tokenizer, **generate_kwargs},
            }
            for i, ids in enumerate(prompts)
        )
        answers: dict[int, Answer] = {}
        for found in AnswerStream(generator, requests, batch_size, prefix=_shareable(self.model, kv)):
            if found.error is not None:
                raise found.error
            text = self.processor.tokenizer.decode(found.tokens, skip_special_tokens=True).strip()
            answers[found.id] = Answer(text, found.tokens, found.stats)
        return [answers[i] for i in range(len(questions))]

    def fork(self) -> VideoSession:
        """Another session with the same video and conversation so far; later questions are independent.

        Nothing is copied: both read the same KV, and each adds its own.
        """
        return copy.copy(self)

    @property
    def input_ids(self) -> Tensor | None:
        """All tokens so far, int64 [1, S], placeholders included; None before the first question."""
        return self._ids

    def _check_request(self, question: str, kwargs: dict[str, Any]) -> None:
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"question must be a non-empty string, got {question!r}")
        if names := sorted(_RESERVED & kwargs.keys()):
            raise ValueError(f"{names[0]} is set by the session and can not be passed to ask")
        if kwargs.get("num_return_sequences", 1) != 1:
            count = kwargs["num_return_sequences"]
            raise ValueError(f"num_return_sequences must be 1 in a session, got {count}; fork it instead")
        asked = self.processor.tokenizer(question, add_special_tokens=False)["input_ids"]
        if set(asked) & set(self._video.visual_ids):
            raise ValueError(f"question must not hold image or video placeholders, got {question!r}")

    def _first_prompt(self, question: str) -> tuple[Tensor, dict[str, Tensor]]:
        text = self.first_turn.replace("{question}", question)
        inputs = self.processor(text=text, videos=[self._video.frames], return_tensors="pt").to(
            self.model.device
        )
        pixels = {name: inputs[name] for name in self._video.adapter.pixel_names if name in inputs}
        return inputs["input_ids"], pixels

    def _prompts(self, questions: Sequence[str]) -> tuple[list[Tensor], LayerKV]:
        """The prompts ``[1, S]`` that would follow what was said so far, and its KV."""
        weights = self._video.weights()
        if self._ids is not None:
            return [self._next_prompt(self._ids, question) for question in questions], self._said_kv(weights)
        first, pixels = self._first_prompt(questions[0])
        kv = self._video.prefix_kv(first, pixels, weights)
        end = next(iter(kv.values()))[0].shape[2]
        prompts = [first]
        for question in questions[1:]:
            # The processor would look at all pixels again: only text is new.
            prompts.append(torch.cat([first[:, :end], self._behind_video(question, first)], dim=1))
        if not torch.equal(self._behind_video(questions[0], first), first[:, end:]):
            return [self._first_prompt(question)[0] for question in questions], kv
        return prompts, kv

    def _said_kv(self, weights: bytes) -> LayerKV:
        """KV of what was said so far; of the video alone where the model has changed since."""
        assert self._ids is not None
        if self._weights == weights:
            return self._kv
        return self._video.prefix_kv(self._ids, self._video.pixels, weights)

    def _behind_video(self, question: str, like: Tensor) -> Tensor:
        """The first turn's tokens behind the last frame, int64 ``[1, n]``."""
        behind = self.first_turn.split("<video>")[1].replace("{question}", question)
        ids = self.processor.tokenizer("<video>" + behind)["input_ids"]
        visual = [place for place, token in enumerate(ids) if token in self._video.visual_ids]
        return like.new_tensor([ids[visual[-1] + 1 :]])

    def _next_prompt(self, ids: Tensor, question: str) -> Tensor:
        text = self.next_turn.replace("{question}", question)
        new = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.cat([ids, ids.new_tensor(new)[None]], dim=1)


class _EncodedVideo:
    """The frames, and the KV of the prompt up to their last token; shared by all forks of a session."""

    def __init__(self, model: PreTrainedModel, frames: np.ndarray):
        self.model = model
        self.frames = frames
        self.adapter = adapter_for(model)
        self.visual_ids = list(self.adapter.visual_ids(model).values())
        self._lock = threading.Lock()
        self._fingerprint = ModelFingerprint(model)
        self._weights = b""  # what computed the KV
        self._prefix: Tensor | None = None
        self._kv: LayerKV = {}
        self.pixels: dict[str, Tensor] = {}

    def weights(self) -> bytes:
        """A fingerprint of the model's weights, adapters and configuration."""
        return self._fingerprint.digest()

    def prefix_kv(self, ids: Tensor, pixels: dict[str, Tensor], weights: bytes) -> LayerKV:
        """KV of `ids` [1, S] up to the last visual token, computed at the first call."""
        self.pixels = pixels
        visual = torch.isin(ids[0], torch.tensor(self.visual_ids, device=ids.device)).nonzero()
        end = int(visual.max()) + 1
        with self._lock:
            known = self._prefix is not None and torch.equal(self._prefix, ids[:, :end])
            if not known or weights != self._weights:
                # One token more than the prefix: a patched model then finds the clip in its own cache.
                prompt = ids[:, : end + 1]
                with torch.no_grad():
                    output = self.model(
                        input_ids=prompt,
                        attention_mask=torch.ones_like(prompt),
                        **{cache_argument(self.model.forward): DynamicCache()},
                        use_cache=True,
                        logits_to_keep=1,
                        return_dict=True,
                        **pixels,
                    )
                self._weights = weights
                self._prefix, self._kv = ids[:, :end], _first_slots(output_cache(output), end)
            return self._kv


def _check_templates(first_turn: str, next_turn: str) -> None:
    for part in ("<video>", "{question}"):
        if first_turn.count(part) != 1:
            raise ValueError(f"first_turn must hold {part} once, got {first_turn!r}")
    if not first_turn.split("<video>")[1].strip():
        raise ValueError(f"first_turn must go on after <video>, got {first_turn!r}")
    if next_turn.count("{question}") != 1:
        raise ValueError(f"next_turn must hold {{question}} once, got {next_turn!r}")


def _shareable(model: PreTrainedModel, kv: LayerKV) -> SharedPrefix | None:
    shares = RowPool(model, 0).shares_prefix
    return SharedPrefix([kv[layer] for layer in sorted(kv)]) if shares else None


def _as_cache(kv: LayerKV) -> DynamicCache:
    """A cache over these very tensors. A DynamicCache grows by concatenation and never writes into them."""
    cache = DynamicCache()
    for index, (keys, values) in sorted(kv.items()):
        cache.update(keys[:, :, :0], values[:, :, :0], index)
        layer: Any = cache.layers[index]
        layer.keys, layer.values = keys, values
    return cache


def _first_slots(cache: Any, length: int) -> LayerKV:
    return {
        i: (layer.keys[:, :, :length], layer.values[:, :, :length]) for i, layer in enumerate(cache.layers)
    }
