"""Clips as the model's inputs: the same normalisation and the same tokens as ``VideoLlavaProcessor`` makes.

The video comes first in every prompt, so what several questions about a clip share is computed once: the
start of the prompt is one sequence, the rest of it and the answer one row for each question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specfuse.data.world import Question
from specfuse.train.build import VIDEO_TOKENS
from specfuse.train.tokenizer import ANSWER, PROMPT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
FACT_WEIGHT = 3.0
# OpenAI CLIP's, as in VideoLlavaVideoProcessor.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class Rows(NamedTuple):
    """M rows of text that follow the start of a prompt; T tokens with padding on the right."""

    ids: Tensor  # [M, T] int64
    targets: Tensor  # [M, T] int64: the token after each; IGNORED outside answers
    weights: Tensor  # [M, T] float32: how much each target counts


def generator(*key: int) -> np.random.Generator:
    """The random numbers of one step: a resumed run draws what the uninterrupted one would have drawn."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def pixels(frames: np.ndarray) -> Tensor:
    """uint8 ``[..., H, W, 3]`` to normalised float32 ``[..., 3, H, W]``."""
    values = torch.from_numpy(np.ascontiguousarray(frames)).float() / 255
    return ((values - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).movedim(-1, -3)


def prompt_start(
    tokenizer: PreTrainedTokenizerFast, placeholder: str = "<video>", count: int = VIDEO_TOKENS
) -> list[int]:
    """Tokens from ``<s>`` to the last ``<video>``, or other placeholder; the same for every question."""
    before = PROMPT.partition("<video>")[0]
    return tokenizer(before).input_ids + [tokenizer.convert_tokens_to_ids(placeholder)] * count


def prompt_end(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """Tokens after the last ``<video>``, up to where the answer begins."""
    after = PROMPT.partition("<video>")[2]
    return tokenizer(after.format(question=question), add_special_tokens=False).input_ids


def rows(
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    *,
    facts_only: bool = False,
    short: bool = False,
) -> Rows:
    """Rows of questions with the target's answers.

    ``facts_only``: up to the fact, the rest left open; ``short``: the drafter's answers instead.
    """
    encoded = []
    for question in questions:
        asked = prompt_end(tokenizer, question.text)
        answer = question.short if short else question.long
        said = _answer(tokenizer, answer)
        # The fact stands in the first sentence; the others hold mostly a choice of words.
        first = len(_answer(tokenizer, answer.partition(". ")[0])) - 1 if question.factual else 0
        if facts_only:
            said = said[: first + 1]  # with the full stop, or the model would not know where to make one
        weights = [0.0] * (len(asked) - 1) + [FACT_WEIGHT] * first + [1.0] * (len(said) - first)
        encoded.append((asked + said[:-1], [IGNORED] * (len(asked) - 1) + said, weights))
    empty = (tokenizer.pad_token_id, IGNORED, 0.0)
    columns = zip(zip(*encoded, strict=True), empty, strict=True)
    return Rows(*(_padded(lists, value) for lists, value in columns))


def _padded(lists: Sequence[Sequence[float]], value: float) -> Tensor:
    tensors = [torch.tensor(values) for values in lists]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _answer(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(ANSWER.format(answer=text), add_special_tokens=False).input_ids
