"""``specfuse demo``: asks a trained model about held-out clips in three ways, in turn, and times each.

Every question is timed from the clip's frames and its text to the last token, processor included:
``model.generate`` as it is, Hugging Face's prompt lookup, and specfuse with the vision cache and a drafter
that goes on learning. Which one comes first rotates.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specfuse.data.world import Question, clip, split
from specfuse.drafters import Drafter
from specfuse.generate import SpeculativeGenerator
from specfuse.run import visual_token_ids
from specfuse.session import FIRST_TURN
from specfuse.stats import GenerationStats
from specfuse.vision.cache import VisionCache, patch

if TYPE_CHECKING:
    from transformers import VideoLlavaForConditionalGeneration, VideoLlavaProcessor

GENERATE, LOOKUP, SPECFUSE = SYSTEMS = ("model.generate", "prompt lookup", "specfuse")
LOOKUP_TOKENS = 10
LONGEST = 160  # tokens of an answer
MOST_QUESTIONS = 14  # nearly every clip has as many


@dataclass(slots=True)
class AskedClip:
    """A held-out clip and what is asked about it."""

    index: int  # in the world
    frames: np.ndarray  # [8, 64, 64, 3] uint8
    questions: list[Question]


class Timed(NamedTuple):
    """One answer of one system."""

    tokens: list[int]
    passes: int  # forward passes of the target
    seconds: float  # from frames and question to the last token
    first_seconds: float  # to the first token


@dataclass(slots=True)
class Answered:
    """One question, answered by every system."""

    index: int  # of the clip
    question: Question
    turn: int  # 0 for the first question about its clip
    timed: dict[str, Timed]
    stats: GenerationStats  # of specfuse's answer

    @property
    def identical(self) -> bool:
        """Whether all systems gave the same tokens."""
        return all(timed.tokens == self.timed[GENERATE].tokens for timed in self.timed.values())

    def speedup(self, over: str) -> float:
        """How many times longer another system took for the whole question."""
        return self.timed[over].seconds / self.timed[SPECFUSE].seconds

    def decode_speedup(self, over: str) -> float:
        """The same from the first token on: encoding the video, and not having to, left out."""
        theirs, ours = (
            self.timed[name].seconds - self.timed[name].first_seconds for name in (over, SPECFUSE)
        )
        return theirs / max(ours, 1e-6)


@dataclass(slots=True)
class DemoResult:
    """All questions so far; figures are medians of ratios per question unless their name says otherwise."""

    answered: list[Answered] = field(default_factory=list)
    hits: int = 0  # of the vision cache
    misses: int = 0

    @property
    def identical(self) -> bool:
        return all(each.identical for each in self.answered)

    def speedup(self, over: str) -> float:
        return statistics.median(each.speedup(over) for each in self.answered)

    def decode_speedup(self, over: str) -> float:
        return statistics.median(each.decode_speedup(over) for each in self.answered)

    def total_speedup(self, over: str) -> float:
        """Ratio of the sums, first questions about a clip and all."""
        theirs, ours = (sum(each.timed[name].seconds for each in self.answered) for name in (over, SPECFUSE))
        return theirs / ours

    def tokens_per_pass(self, system: str = SPECFUSE) -> float:
        timed = [each.timed[system] for each in self.answered]
        return sum(len(t.tokens) for t in timed) / max(sum(t.passes for t in timed), 1)

    def tokens_per_second(self, system: str) -> float:
        timed = [each.timed[system] for each in self.answered]
        return sum(len(t.tokens) for t in timed) / sum(t.seconds for t in timed)

    def first_token_seconds(self, system: str, later: bool) -> float | None:
        """Median time to the first token, of first questions about a clip or of later ones."""
        times = [each.timed[system].first_seconds for each in self.answered if (each.turn > 0) == later]
        return statistics.median(times) if times else None

    @property
    def ttft_second_question_ratio(self) -> float | None:
        """Time of specfuse to the first token of a clip's second question over its first; median of clips."""
        times = {(each.index, each.turn): each.timed[SPECFUSE].first_seconds for each in self.answered}
        ratios = [times[name, 1] / times[name, 0] for name, turn in times if turn == 1]
        return statistics.median(ratios) if ratios else None

    def as_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        figures: dict[str, Any] = {
            "identical": self.identical,
            "speedup_vs_generate": self.speedup(GENERATE),
            "speedup_vs_prompt_lookup": self.speedup(LOOKUP),
            "tokens_per_pass": self.tokens_per_pass(),
            "ttft_second_question_ratio": self.ttft_second_question_ratio,
            "questions": len(self.answered),
            "clips": len({each.index for each in self.answered}),
            "tokens": sum(len(each.timed[GENERATE].tokens) for each in self.answered),
            "decode_speedup_vs_generate": self.decode_speedup(GENERATE),
            "decode_speedup_vs_prompt_lookup": self.decode_speedup(LOOKUP),
            "total_speedup_vs_generate": self.total_speedup(GENERATE),
            "total_speedup_vs_prompt_lookup": self.total_speedup(LOOKUP),
            "vision_cache_hits": self.hits,
            "vision_cache_misses": self.misses,
        }
        figures["systems"] = {
            system: {
                "median_seconds": statistics.median(each.timed[system].seconds for each in self.answered),
                "tokens_per_second": self.tokens_per_second(system),
                "tokens_per_pass": self.tokens_per_pass(system),
                "first_token_seconds_first_question": self.first_token_seconds(system, later=False),
                "first_token_seconds_later_questions": self.first_token_seconds(system, later=True),
            }
            for system in SYSTEMS
        }
        return figures


def choose(clips: int, questions: int, seed: int) -> list[AskedClip]:
    """Held-out clips with questions of mixed kinds: the same for the same seed.

    Raises:
        ValueError: ``clips`` or ``questions`` out of range.
    """
    every = split("held_out")
    if not 1 <= clips <= len(every):
        raise ValueError(f"clips must be from 1 to {len(every)}, got {clips}")
    if not 1 <= questions <= MOST_QUESTIONS:
        raise ValueError(f"questions must be from 1 to {MOST_QUESTIONS}, got {questions}")
    draw = np.random.default_rng(seed)
    return [ask(index, questions, draw) for index in draw.choice(every, clips, replace=False).tolist()]


def ask(index: int, count: int, draw: np.random.Generator) -> AskedClip:
    """One clip and ``count`` questions, or all it has: descriptions and facts in turn."""
    drawn = clip(index)
    kinds: list[list[Question]] = [[], []]
    for place in draw.permutation(len(drawn.questions)):
        kinds[drawn.questions[place].factual].append(drawn.questions[place])
    chosen: list[Question] = []
    while len(chosen) < count and any(kinds):
        chosen.append(kinds[len(chosen) % 2 if all(kinds) else int(not kinds[0])].pop())
    return AskedClip(index, drawn.frames, chosen)


class Contest:
    """The three systems on one model; ``answer`` asks all of them the same question.

    Args:
        model: in eval mode; it is left as it is, specfuse gets a copy with a vision cache.
        processor: its processor.
        drafter: of specfuse; learns on the way.
        max_nodes: as for ``specfuse.generate``.
    """

    def __init__(
        self,
        model: VideoLlavaForConditionalGeneration,
        processor: VideoLlavaProcessor,
        drafter: Drafter | str | None,
        max_nodes: int | str,
    ):
        self.processor = processor
        self.plain, self.cached = model, copy.deepcopy(model)
        self.cache: VisionCache = patch(self.cached)
        self.generator = SpeculativeGenerator(self.cached, drafter, max_nodes=max_nodes)
        # Hugging Face's lookup would draft the video's placeholders and fail on them.
        self.hidden = sorted(visual_token_ids(model))
        self.asked = 0

    def answer(self, asked: AskedClip, turn: int) -> Answered:
        """One question through every system; another one begins each time."""
        question = asked.questions[turn]
        timed = {}
        for place in range(len(SYSTEMS)):
            system = SYSTEMS[(self.asked + place) % len(SYSTEMS)]
            timed[system] = self._timed(system, asked.frames, question.text)
        self.asked += 1
        assert self.generator.last_stats is not None
        return Answered(asked.index, question, turn, timed, self.generator.last_stats)

    def _timed(self, system: str, frames: np.ndarray, question: str) -> Timed:
        watch = FirstToken()
        with counted(self.plain if system != SPECFUSE else self.cached) as passes:
            start = time.perf_counter()
            inputs = self.processor(
                text=FIRST_TURN.format(question=question), videos=frames, return_tensors="pt"
            )
            sequences = self._generate(system, inputs.to(self.plain.device), watch)
            tokens = sequences[0, inputs["input_ids"].shape[1] :].tolist()
            seconds = time.perf_counter() - start
        return Timed(tokens, passes[0], seconds, watch.at - start)

    def _generate(self, system: str, inputs: Mapping[str, Tensor], streamer: FirstToken) -> Tensor:
        options: dict[str, Any] = {
            **inputs,
            "streamer": streamer,
            "max_new_tokens": LONGEST,
            "do_sample": False,
        }
        if system == SPECFUSE:
            return self.generator.generate(**options)  # type: ignore[return-value]
        if system == LOOKUP:
            options |= {"prompt_lookup_num_tokens": LOOKUP_TOKENS, "suppress_tokens": self.hidden}
        return self.plain.generate(**options)


class FirstToken:
    """A streamer that notes when the first token came, by a clock in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.at = 0.0
        self.prompts = 0

    def put(self, value: Tensor) -> None:
        # The prompt comes first.
        if self.prompts and not self.at:
            self.at = self.clock()
        self.prompts = 1

    def end(self) -> None:
        pass


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """Counts calls of a model inside the block."""
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    handle = model.register_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


def run_demo(
    contest: Contest,
    chosen: Sequence[AskedClip],
    seed: int = 0,
    tell: Callable[[DemoResult, AskedClip], object] = lambda result, asked: None,
) -> DemoResult:
    """Warms up on a training clip, then asks every question about the chosen ones.

    Args:
        contest: the systems.
        chosen: clips and questions.
        seed: of the questions asked for warming up.
        tell: is told the result so far after every question, and the clip.
    """
    warm = ask(int(split("train")[0]), 3, np.random.default_rng(seed))
    for turn in range(len(warm.questions)):
        contest.answer(warm, turn)
    before = contest.cache.stats
    result = DemoResult()
    for asked in chosen:
        for turn in range(len(asked.questions)):
            result.answered.append(contest.answer(asked, turn))
            now = contest.cache.stats
            result.hits, result.misses = now.hits - before.hits, now.misses - before.misses
            tell(result, asked)
    return result
