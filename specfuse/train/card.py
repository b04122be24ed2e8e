"""What goes beside the weights: the model card and the loss curves."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np

from specfuse.data.world import FACTUAL, WORLD_SEED
from specfuse.train.evaluate import Accuracy
from specfuse.train.loop import Progress

CARD = """---
library_name: transformers
pipeline_tag: {task}
license: apache-2.0
---
# {title}, trained on specfuse's driving world

A miniature: {model} with {parameters:,} parameters, for
{input}. It knows the procedural driving world of `specfuse.data.world`
and nothing else.

- Data: world {world}, {train_clips} training clips; accuracy on {clips} of the held-out clips, whose drives
  were never seen.
- Command: `{command}`
- Seed {seed}; {vision_steps} steps on {pictures} in {vision_minutes:.1f} minutes, then {text_steps} steps on
  answers in {text_minutes:.1f} minutes.
- {versions}.

## Accuracy on held-out clips

Greedy answers to {questions} factual questions; the first sentence counts. "Most frequent" is what always
giving the most frequent answer of each kind to these questions would reach.

| kind | asked | right | most frequent |
|---|---|---|---|
{table}

## Confusion

True answer: what was said how often, for each kind.

{confusion}

## Examples

{examples}

{use}
"""
TARGET = {
    "title": "Tiny Video-LLaVA",
    "task": "video-text-to-text",
    "model": "Hugging Face's `VideoLlavaForConditionalGeneration`",
    "input": "8 frames of 64 x 64 pixels, 65 tokens each",
    "pictures": "frames",
    "use": """    from transformers import AutoProcessor, VideoLlavaForConditionalGeneration
    model = VideoLlavaForConditionalGeneration.from_pretrained("this directory")
    processor = AutoProcessor.from_pretrained("this directory")""",
}
DRAFTER = {
    "title": "Tiny EventGPT",
    "task": "image-text-to-text",
    "model": "`specfuse.models.eventgpt.EventGptForConditionalGeneration`",
    "input": "5 pictures of events of 64 x 64 pixels, 70 tokens together",
    "pictures": "pictures of events",
    "use": """    from specfuse.models.eventgpt import EventGptForConditionalGeneration
    from specfuse.models.eventgpt_processor import EventGptProcessor
    model = EventGptForConditionalGeneration.from_pretrained("this directory")
    processor = EventGptProcessor.from_pretrained("this directory")""",
}
"""What a card says of each kind of model."""


HEAD_CARD = """---
library_name: specfuse
license: apache-2.0
---
# A drafting head for the tiny Video-LLaVA

One transformer layer ({parameters:,} parameters) on the target's hidden states{events}, for
`specfuse.HeadDrafter`. It can not change an answer, only the number of passes that it takes.

- Data: world {world}; what the target itself says about {train_clips} training clips.
- Command: `{command}`
- Seed {seed}; {steps} steps in {minutes:.1f} minutes.
- {versions}.

## On {clips} held-out clips

| draft | right, where those before were |
|---|---|
{acceptance}

Above, the head's first choice along {answers} answers of the target. In {calls} calls of
`specfuse.generate` with trees of 16 drafts: **{tokens_per_pass:.2f} tokens per pass**, tokens identical to
plain decoding in {identical:.1%} of the calls; per pass {draft_us} us of drafting and {pass_us} us for the
rest, without drafts {plain_pass_us} us.

    drafter = specfuse.HeadDrafter.from_pretrained("this directory", target)
    specfuse.generate(target, drafter, **inputs)
"""


def write_head_card(directory: Path, figures: dict[str, Any], about: dict[str, Any]) -> None:
    """Writes ``README.md`` of a head from the figures of ``specfuse.train.head_report.measure``."""
    depths = sorted(name for name in figures if name.startswith("acceptance_"))
    lines = [f"| {name.removeprefix('acceptance_')} | {figures[name]:.1%} |" for name in depths]
    card = HEAD_CARD.format(
        world=WORLD_SEED, versions=_versions(), acceptance="\n".join(lines), **figures, **about
    )
    (directory / "README.md").write_text(card)


DISTILL_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---
# Tiny EventGPT, distilled to draft for the tiny Video-LLaVA

`specfuse.models.eventgpt.EventGptForConditionalGeneration`, trained further on what the target itself says:
its tokens, the distributions behind them and its hidden states, with pictures of events to look at. It can
not change an answer of the target, only the number of passes that it takes.

- Data: world {world}; what the target says about {train_clips} training clips.
- Command: `{command}`
- Seed {seed}; {steps} steps in {minutes:.1f} minutes.
- {versions}.

## On {clips} held-out clips

| draft | right before, where those above were | right now |
|---|---|---|
{acceptance}

Above, the drafter's first choices along the target's answers. In chains of {depth} drafts these are
{tokens_per_pass_before:.2f} tokens per pass of the target before and **{tokens_per_pass_after:.2f}** now.

    drafter = specfuse.EventDrafter(model, processor, target_processor)
    specfuse.generate(target, drafter, draft_inputs=drafter.see(stream), **inputs)
"""


def write_distill_card(directory: Path, figures: dict[str, Any], about: dict[str, Any]) -> None:
    """Writes ``README.md`` of a distilled drafter from the figures of ``specfuse.train.distill``."""
    names = sorted(n.removesuffix("_after") for n in figures if n.startswith("acceptance") and "after" in n)
    shares = [(figures[f"{name}_before"], figures[f"{name}_after"]) for name in names]
    lines = [f"| {depth} | {old:.1%} | {new:.1%} |" for depth, (old, new) in enumerate(shares, start=1)]
    card = DISTILL_CARD.format(
        world=WORLD_SEED,
        versions=_versions(),
        acceptance="\n".join(lines),
        depth=len(names),
        **figures,
        **about,
    )
    (directory / "README.md").write_text(card)


def write_card(
    directory: Path,
    accuracy: Accuracy,
    vision: Progress,
    text: Progress,
    examples: list[tuple[str, str, str]],
    about: dict[str, Any],
) -> None:
    """Writes ``README.md``.

    ``examples`` are question, answer given and the answer in the data; ``about`` TARGET or DRAFTER with
    parameters, train_clips, seed and command.
    """
    said = "\n\n".join(f"**{q}**\n\nmodel: {a}\n\ndata: {wanted}" for q, a, wanted in examples)
    card = CARD.format(
        world=WORLD_SEED,
        clips=accuracy.clips,
        questions=sum(accuracy.asked.values()),
        vision_steps=vision.step,
        vision_minutes=vision.seconds / 60,
        text_steps=text.step,
        text_minutes=text.seconds / 60,
        versions=_versions(),
        table=accuracy_table(accuracy),
        confusion=confusion_lines(accuracy),
        examples=said,
        **about,
    )
    (directory / "README.md").write_text(card)


def _versions() -> str:
    import torch
    import transformers

    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"Python {platform.python_version()}, {libraries}"


def accuracy_table(accuracy: Accuracy) -> str:
    """Lines of a Markdown table, one for each kind of question and one for all."""
    lines = []
    guessed = 0
    for kind in FACTUAL:
        if not (asked := accuracy.asked[kind]):
            continue
        truths: dict[str, int] = {}
        for (true, _), count in accuracy.confusion[kind].items():
            truths[true] = truths.get(true, 0) + count
        guessed += max(truths.values())
        lines.append(f"| {kind} | {asked} | {accuracy.of(kind):.1%} | {max(truths.values()) / asked:.1%} |")
    asked = max(sum(accuracy.asked.values()), 1)
    return "\n".join([*lines, f"| **all** | {asked} | **{accuracy.overall:.1%}** | {guessed / asked:.1%} |"])


def confusion_lines(accuracy: Accuracy) -> str:
    """One line for each kind and true answer."""
    lines = []
    for kind in FACTUAL:
        pairs: dict[tuple[str, str], int] = dict(accuracy.confusion.get(kind, {}))
        for true in sorted({pair[0] for pair in pairs}):
            said = sorted(((n, s) for (t, s), n in pairs.items() if t == true), reverse=True)
            lines.append(f"- {kind}, {true}: " + ", ".join(f"{s} {n}" for n, s in said))
    return "\n".join(lines)


def write_curves(directory: Path, stages: dict[str, Progress]) -> bool:
    """Writes ``loss.png``, one panel for each stage; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(stages), figsize=(5 * len(stages), 3.2), squeeze=False)
    for axis, (name, progress) in zip(axes[0], stages.items(), strict=True):
        losses = np.array(progress.losses)
        window = max(len(losses) // 50, 1)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axis.plot(losses, color="0.8", linewidth=0.8)
        axis.plot(np.arange(len(smooth)) + window / 2, smooth, linewidth=1.5)
        axis.set(
            title=f"{name}, {progress.seconds / 60:.1f} minutes", xlabel="step", ylabel="loss", yscale="log"
        )
    figure.tight_layout()
    figure.savefig(directory / "loss.png", dpi=110)
    pyplot.close(figure)
    return True
