"""How often a trained model is right about held-out clips: greedy answers, read by the world's scorer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specfuse.data.world import FACTUAL, score
from specfuse.data.world.score import read_answer
from specfuse.hf.cache_names import OUTPUT_CACHE
from specfuse.train.batches import prompt_end, prompt_start
from specfuse.train.clip_store import Clips
from specfuse.train.language import Features, repeat_cache, start_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, VideoLlavaForConditionalGeneration
    from transformers.cache_utils import Cache

FIRST_SENTENCE = 28  # tokens; longer first sentences do not occur in factual answers
Ask = Callable[[int, list[str], int], list[str]]
"""Position of a clip, questions about it and a number of tokens at most to a model's greedy answers."""


@dataclass(slots=True)
class Accuracy:
    """Right and asked, per kind of question, and which answers were mistaken for which."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    confusion: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)  # (true, said)
    clips: int = 0

    def of(self, kind: str) -> float:
        """The share of right answers to one kind of question."""
        return self.right[kind] / max(self.asked[kind], 1)

    @property
    def overall(self) -> float:
        """The share of right answers to all factual questions that were asked."""
        return sum(self.right.values()) / max(sum(self.asked.values()), 1)

    def as_dict(self) -> dict[str, Any]:
        """Figures for a model card or JSON."""
        kinds = {kind: round(self.of(kind), 4) for kind in FACTUAL if self.asked[kind]}
        return {
            "overall": round(self.overall, 4),
            "clips": self.clips,
            "questions": sum(self.asked.values()),
            **kinds,
        }


def evaluate(
    model: VideoLlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    clips: Clips,
    done: Callable[[int], object] = lambda clips: None,
) -> Accuracy:
    """Asks every factual question about every clip; ``done`` is told how many clips are through."""
    return examine(ask_about(model, tokenizer, clips), clips, done)


@torch.no_grad()
def examine(ask: Ask, clips: Clips, done: Callable[[int], object] = lambda clips: None) -> Accuracy:
    """The same for any model that can be asked."""
    result = Accuracy()
    for index, questions in enumerate(clips.questions):
        factual = [question for question in questions if question.factual]
        texts = [question.text for question in factual]
        answers = ask(index, texts, FIRST_SENTENCE)
        for question, text in zip(factual, answers, strict=True):
            result.asked[question.kind] += 1
            result.right[question.kind] += score(question, text)
            said = read_answer(question.kind, text) or "unclear"
            result.confusion.setdefault(question.kind, Counter())[str(question.answer), said] += 1
        result.clips += 1
        done(result.clips)
    return result


def ask_about(
    model: VideoLlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, clips: Clips
) -> Ask:
    """Asks a Video-LLaVA, which is put into eval mode, about clips."""
    model.eval()
    features = Features(model.model.video_tower, clips)
    return lambda clip, texts, most: answer_greedily(model, tokenizer, features.live([clip]), texts, most)


@torch.no_grad()
def answer_greedily(
    model: VideoLlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    features: Tensor,
    questions: list[str],
    most: int,
) -> list[str]:
    """The first ``most`` tokens of ``model.generate``'s greedy answers, for several questions about one clip.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        features: ``[1, 520, D]`` of the clip, before the projector.
        questions: without the prompt's other words.
        most: tokens to write at most.
    """
    start = prompt_start(tokenizer)
    return answer_behind(model, tokenizer, start_cache(model, start, features), len(start), questions, most)


def answer_behind(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    once: Cache,
    start: int,
    questions: list[str],
    most: int,
) -> list[str]:
    """The same for any model, behind the ``start`` tokens of a prompt that are in a cache."""
    ends = [prompt_end(tokenizer, question) for question in questions]
    longest = max(map(len, ends))
    # Questions end together: padding stands between the video and the question, unseen.
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(end)) + end for end in ends])
    seen = torch.tensor([[1] * start + [0] * (longest - len(end)) + [1] * len(end) for end in ends])
    ids, seen = ids.to(model.device), seen.to(model.device)
    cache = repeat_cache(once, len(questions))
    written: list[Tensor] = []
    ended = torch.zeros(len(questions), dtype=torch.bool, device=model.device)
    while len(written) < most and not ended.all():
        positions = (seen.cumsum(1) - 1)[:, -ids.shape[1] :].clamp(min=0)
        states = model.model.language_model(
            inputs_embeds=model.get_input_embeddings()(ids),
            attention_mask=seen,
            position_ids=positions,
            **{OUTPUT_CACHE: cache},
            use_cache=True,
        ).last_hidden_state
        ids = model.lm_head(states[:, -1:]).argmax(-1).masked_fill(ended[:, None], tokenizer.pad_token_id)
        ended |= ids[:, 0] == tokenizer.eos_token_id
        seen = torch.cat([seen, torch.ones_like(ids)], 1)
        written.append(ids)
    texts = tokenizer.batch_decode(torch.cat(written, 1), skip_special_tokens=True)
    return [text.strip() for text in texts]
