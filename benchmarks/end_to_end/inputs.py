"""What is asked: held-out clips of the driving world, or recorded answers replayed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from end_to_end.replayed import Script
from end_to_end.shapes import Prompt, inputs_of
from end_to_end.systems import Asked
from specfuse.data.recording import Recording, Sample
from specfuse.data.world import split
from specfuse.demo import LONGEST, AskedClip
from specfuse.session import FIRST_TURN

UNPREDICTABLE = "random tokens"


def miniature_questions(processor: Any, clips: Sequence[AskedClip]) -> list[Asked]:
    """Every question about every clip, in order."""
    questions = []
    for asked in clips:
        for turn, question in enumerate(asked.questions):
            text = FIRST_TURN.format(question=question.text)
            inputs = processor(text=text, videos=asked.frames, return_tensors="pt")
            questions.append(Asked(asked.index, turn, inputs, LONGEST))
    return questions


def warm_clip() -> int:
    """A training clip."""
    return int(split("train")[0])


def replayed_questions(
    model: Any, prompt: Prompt, recording: Recording, count: int, script: Script, longest: int | None = None
) -> list[Asked]:
    """``count`` recorded answers, spread evenly over the recording, each with a second question after it.

    Of the second question only the first token is wanted. What lies between the answers was said too:
    it stands in ``earlier``.

    Args:
        model: of :func:`end_to_end.shapes.build`, with ``script``.
        prompt: its tokens.
        recording: what the target said.
        count: how many answers.
        script: is written before each question.
        longest: tokens of an answer that are replayed; all by default.

    Raises:
        ValueError: ``count`` out of range.
    """
    samples = recording.samples
    if not 1 <= count <= len(samples):
        raise ValueError(f"questions must be from 1 to {len(samples)}, got {count}")
    # Midpoints of equal stretches: the first question has half a stretch behind it.
    places = [(2 * i + 1) * len(samples) // (2 * count) for i in range(count)]
    words, questions, done = words_of(samples), [], 0
    for place in places:
        earlier = [sample.target for sample in samples[done:place]]
        answer = samples[place].target[:longest]
        for turn, said in enumerate((answer, answer[:1])):
            inputs = inputs_of(model, prompt, words, place, turn)
            length = inputs["input_ids"].shape[1]

            def prepare(length: int = length, said: Sequence[int] = said) -> None:
                script.write(length, said)

            questions.append(
                Asked(place, turn, inputs, len(said), turn == 0, earlier if turn == 0 else (), prepare)
            )
        done = place + 1
    return questions


def words_of(samples: Sequence[Sample], most: int = 8) -> list[int]:
    """The question's words as answers repeat them: what more than half of all answers begin with."""
    words: list[int] = []
    for place in range(most):
        said = [sample.target[place] for sample in samples if len(sample.target) > place]
        if not said:
            break
        common = max(sorted(set(said)), key=said.count)
        if 2 * said.count(common) <= len(samples):
            break
        words.append(common)
    return words


def unpredictable(answers: int = 64, tokens: int = 50, vocabulary: int = 32000) -> Recording:
    """Answers of random tokens: nothing can be drafted."""
    draw = random.Random(0)
    samples = [
        Sample(tuple(draw.randrange(3, vocabulary) for _ in range(tokens)), None, "", str(index))
        for index in range(answers)
    ]
    return Recording(samples, UNPREDICTABLE)
