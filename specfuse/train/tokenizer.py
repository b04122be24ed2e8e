"""Byte-level BPE trained on the driving world's questions and answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from specfuse.data.world import Question
from specfuse.models.tokenizer import learn_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPT = "USER: <video>\n{question} ASSISTANT:"
ANSWER = " {answer}</s>"


def train_tokenizer(questions: Iterable[Question], vocabulary: int) -> PreTrainedTokenizerFast:
    """See ``specfuse.models.tokenizer.learn_tokenizer``."""
    # What surrounds the special tokens: those are cut out before words are looked at.
    return learn_tokenizer((f"USER: \n{q.text} ASSISTANT: {q.long}" for q in questions), vocabulary)
