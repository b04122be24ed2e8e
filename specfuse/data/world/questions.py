"""Questions about a clip with both models' answers: six kinds ask for a description, thirteen for a fact."""

from __future__ import annotations

from dataclasses import dataclass

from specfuse.data.world import long_style, short_style
from specfuse.data.world.facts import facts
from specfuse.data.world.score import READINGS, read_answer
from specfuse.data.world.splits import WORLD_SEED
from specfuse.data.world.visible import View
from specfuse.data.world.wording import Wording

DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "describe": ("Describe this video.", "What do you see in this video?", "Please describe the scene."),
    "elements": (
        "What are the key elements in this scene?",
        "Which important objects are in the video?",
        "List the main elements of the scene.",
    ),
    "layout": (
        "Describe the layout of the road.",
        "How is the road laid out?",
        "What does the road look like?",
    ),
    "vehicles": (
        "Which vehicles are there, and what are they doing?",
        "Describe the vehicles in the video.",
        "What can you say about the vehicles?",
    ),
    "happening": (
        "What is happening in this scene?",
        "What is going on in the video?",
        "Explain what happens here.",
    ),
    "attention": (
        "What should the driver pay attention to?",
        "What should the driver watch out for?",
        "Which dangers are there for the driver?",
    ),
}
FACTUAL = tuple(READINGS)
KINDS = (*DESCRIPTIONS, *FACTUAL)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one clip."""

    kind: str
    text: str
    long: str  # the target's answer
    short: str  # the drafter's answer
    answer: str | None = None  # canonical; None where a description is asked for

    @property
    def factual(self) -> bool:
        """True if there is one right answer."""
        return self.answer is not None


def ask(view: View, world_seed: int = WORLD_SEED) -> list[Question]:
    """All questions about a clip. They depend on what is seen in it and on its index, on nothing else."""
    scene = view.scene

    def voice(name: str) -> Wording:
        return Wording(world_seed, scene.drive, scene.clip, name)

    questions = []
    for kind, texts in DESCRIPTIONS.items():
        text = voice(kind).pick("question", texts)
        long = long_style.describe(kind, view, voice(f"{kind}, long"))
        questions.append(
            Question(kind, text, long, short_style.describe(kind, view, voice(f"{kind}, short")))
        )
    for fact in facts(view, voice("facts")):
        say, brief = voice(f"{fact.kind} {fact.answer}, long"), voice(f"{fact.kind} {fact.answer}, short")
        long = long_style.with_fact(say.pick("fact", fact.long), fact.related, view, say)
        short = short_style.with_fact(brief.pick("fact", fact.short), fact.related, view, brief)
        text = voice(fact.kind).pick("question", fact.questions)
        questions.append(Question(fact.kind, text, long, short, fact.answer))
    return questions


def score(question: Question, answer_text: str) -> bool:
    """True if the first sentence of an answer gives the right answer to a factual question, and no other.

    Raises:
        ValueError: the question asks for a description.
    """
    if question.answer is None:
        raise ValueError(
            f"a question of kind {question.kind!r} asks for a description and has no right answer"
        )
    return read_answer(question.kind, answer_text) == question.answer
