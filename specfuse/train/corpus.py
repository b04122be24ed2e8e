"""``specfuse train corpus``: what the target says about training clips, remembered for ``CorpusDrafter``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from specfuse.data.miniature import CORPUS_FILE
from specfuse.data.world import WORLD_SEED, split
from specfuse.drafters import CorpusDrafter
from specfuse.models.checkpoint import load_video_llava
from specfuse.train.batches import prompt_end, prompt_start
from specfuse.train.clip_store import load_clips
from specfuse.train.outputs import Output, collect_outputs, outputs_file, weights_digest
from specfuse.train.presets import Preset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CLIPS = 180  # at about 1,220 tokens each the file stays below 1 MB
CARD = """# What the tiny Video-LLaVA says about {clips} training clips

{answers:,} greedy answers, {tokens:,} tokens, to every question about clips spread over the training split of
world {world}; a file of `specfuse.CorpusDrafter`. Questions are kept as hashes. Answers of the target with
weights {weights} only: another model does not talk like this.

    {command}
"""


@dataclass(slots=True)
class CorpusSettings:
    """What is remembered, and where."""

    directory: Path
    target: Path
    preset: Preset
    cache: Path  # of drawn clips
    device: str = "cpu"


def train_corpus(
    settings: CorpusSettings, report: Callable[[str, float, str], None] = lambda stage, share, text: None
) -> dict[str, Any]:
    """Asks the target everything about training clips and writes a ``CorpusDrafter``'s file.

    What was asked before, by this command or for training a head, is in the cache and not asked again.

    Args:
        settings: whom to ask, and about how much.
        report: is told about progress.

    Returns:
        The figures in ``corpus.json``: clips, answers, tokens, bytes, and the digest of the target's weights.

    Raises:
        FileExistsError: the directory holds files, but no corpus.
        NotADirectoryError: the directory is a file.
        FileNotFoundError, ValueError: what ``load_video_llava`` and ``collect_outputs`` raise.
    """
    # A corpus may be made again; the card of a model keeps its place.
    held = {path.name for path in settings.directory.iterdir()} if settings.directory.exists() else set()
    if held and CORPUS_FILE not in held:
        raise FileExistsError(f"{settings.directory} is not empty, and holds no corpus")
    model, processor = load_video_llava(settings.target, dtype=torch.float32, device=settings.device)
    train = split("train")[: settings.preset.train_clips]
    count = min(CLIPS, len(train))
    chosen = train[np.linspace(0, len(train) - 1, count).astype(int)]
    clips = load_clips(chosen, settings.cache, lambda n: report("clips", n / count, f"{n} clips drawn"))
    settings.directory.mkdir(parents=True, exist_ok=True)
    outputs = collect_outputs(
        model,
        processor.tokenizer,
        clips,
        range(count),
        outputs_file(settings.cache, model),
        lambda n: report("answers", n / count, f"about {n} of {count} clips"),
    )
    path = settings.directory / CORPUS_FILE
    remember(outputs, processor.tokenizer).save(path)
    figures = {
        "clips": count,
        "answers": len(outputs),
        "tokens": sum(len(output.tokens) for output in outputs),
        "bytes": path.stat().st_size,
        "weights": weights_digest(model),
    }
    (settings.directory / "corpus.json").write_text(json.dumps(figures, indent=2) + "\n")
    command = f"specfuse train corpus --target TARGET --preset {settings.preset.name} --out DIR"
    card = CARD.format(world=WORLD_SEED, command=command, **figures)
    (settings.directory / "README.md").write_text(card)
    return figures


def remember(outputs: list[Output], tokenizer: PreTrainedTokenizerFast) -> CorpusDrafter:
    """A drafter that has seen these answers, each under the question as the generation loop words it."""
    video = tokenizer.convert_tokens_to_ids("<video>")
    start = [token for token in prompt_start(tokenizer) if token != video]
    drafter = CorpusDrafter()
    for output in outputs:
        drafter.observe(output.tokens, question=start + prompt_end(tokenizer, output.question))
    return drafter
