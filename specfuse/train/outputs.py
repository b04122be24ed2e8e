"""What the target itself says: its greedy answers to questions about clips, kept in a file.

Heads and drafters learn from these, not from the data's answers: what counts is what the target will say.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specfuse.data.world import split
from specfuse.passes.tree_forward import TreeForward
from specfuse.train.batches import pixels, prompt_end, prompt_start
from specfuse.train.clip_store import Clips, load_clips
from specfuse.train.loop import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, VideoLlavaForConditionalGeneration

LONGEST = 160
"""Tokens of an answer at most, as in the target's own generation config."""
GROUP = 4  # clips that are answered about at once


class Output(NamedTuple):
    """One answer of the target."""

    clip: int  # index in the world
    kind: str
    question: str
    tokens: list[int]  # of the answer, end-of-sequence included where the answer got there


def collect_outputs(
    model: VideoLlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    clips: Clips,
    clip_positions: Sequence[int],
    path: str | os.PathLike[str],
    done: Callable[[int], object] = lambda clips: None,
) -> list[Output]:
    """The target's answers to every question about some clips, in the order of ``clip_positions``.

    What the file already holds is not computed again, and what is computed is appended clip by clip.

    Args:
        model: the target, in eval mode and float32, on any device.
        tokenizer: its tokenizer.
        clips: clips with their questions.
        clip_positions: positions in ``clips``.
        path: of the file; created if missing.
        done: is told how many of the clips are through.

    Raises:
        ValueError: the file is none of this kind, is broken, or holds the answers of other weights.
    """
    path = Path(path)
    known = _read(path, weights_digest(model))
    wanted = {int(clips.indices[position]): position for position in clip_positions}
    missing = [position for clip, position in wanted.items() if clip not in known]
    done(len(wanted) - len(missing))
    for first in range(0, len(missing), GROUP):
        group = missing[first : first + GROUP]
        questions = [[question.text for question in clips.questions[position]] for position in group]
        answers = answer_fully(model, tokenizer, pixels(clips.frames[group]), questions, LONGEST)
        # Unbuffered: a line is one write, so that two runs may share a file.
        with path.open("ab", buffering=0) as file:
            for position, said in zip(group, answers, strict=True):
                clip, asked = int(clips.indices[position]), clips.questions[position]
                known[clip] = [Output(clip, q.kind, q.text, t) for q, t in zip(asked, said, strict=True)]
                rows = [output[1:] for output in known[clip]]
                file.write(json.dumps([clip, rows], separators=(",", ":")).encode() + b"\n")
        done(len(wanted) - len(missing) + first + len(group))
    return [output for clip in wanted for output in known[clip]]


def world_outputs(
    model: VideoLlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pool: int,
    counts: tuple[int, int],
    cache: str | os.PathLike[str],
    report: Report = lambda stage, share, text: None,
) -> tuple[Clips, list[Output]]:
    """Clips of the world and what the target says about them; all that learn from it share a file.

    Args:
        model, tokenizer: as for ``collect_outputs``.
        pool: how many of the training split's first clips may be learned from.
        counts: clips taken evenly from those, and from the held-out split; they come in this order.
        cache: directory of drawn clips and of answers.
        report: is told about progress.
    """
    pools = (split("train")[:pool], split("held_out"))
    spread = [p[np.linspace(0, len(p) - 1, n).astype(int)] for p, n in zip(pools, counts, strict=True)]
    chosen = np.concatenate(spread)
    total = len(chosen)
    clips = load_clips(chosen, cache, lambda n: report("clips", n / total, f"{n} of {total} drawn"))
    outputs = collect_outputs(
        model,
        tokenizer,
        clips,
        range(total),
        outputs_file(cache, model),
        lambda n: report("answers", n / total, f"about {n} of {total} clips"),
    )
    return clips, outputs


def outputs_file(cache: str | os.PathLike[str], model: torch.nn.Module) -> Path:
    """Where the cache keeps what a target says: every training that learns from it reads the same file."""
    return Path(cache) / f"outputs-{weights_digest(model)}.jsonl"


@torch.no_grad()
def answer_fully(
    model: VideoLlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    videos: Tensor,
    questions: Sequence[Sequence[str]],
    longest: int,
) -> list[list[list[int]]]:
    """Tokens of ``model.generate``'s greedy answers to several questions about each of several clips.

    A clip's questions are branches of one tree behind the video: its keys and values exist once, and a pass
    carries one token of every answer that is not finished.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        videos: ``[M, 8, 3, H, W]`` float32, normalised.
        questions: of each clip, without the prompt's other words.
        longest: tokens of an answer at most.

    Returns:
        For each clip and question the answer's tokens, end-of-sequence included.
    """
    branches = _Branches(model, prompt_start(tokenizer), videos, max(map(len, questions)))
    ends = [[prompt_end(tokenizer, question) for question in asked] for asked in questions]
    following = branches.run(ends)
    answers: list[list[list[int]]] = [[[] for _ in asked] for asked in questions]
    while True:
        new: list[list[list[int]]] = []
        for said, tokens in zip(answers, following, strict=True):
            new.append([[] for _ in said])
            for branch, token in enumerate(tokens):
                if token < 0:
                    continue
                said[branch].append(token)
                if token != tokenizer.eos_token_id and len(said[branch]) < longest:
                    new[-1][branch] = [token]
        if not any(token for row in new for token in row):
            return answers
        following = branches.run(new)


class _Branches:
    """M videos, each with branches of text that see the video and themselves."""

    def __init__(
        self, model: VideoLlavaForConditionalGeneration, start: list[int], videos: Tensor, branches: int
    ):
        self.forward = TreeForward(model, len(videos), len(start) + 64 * branches)
        ids = torch.tensor(start).expand(len(videos), -1)
        self.forward.prefill({"input_ids": ids, "pixel_values_videos": videos}, None)
        self.forward.cache.set_lengths([len(start)] * len(videos))
        self.owners = torch.zeros((len(videos), 0), dtype=torch.int64)  # branch of every slot
        self.lengths = [[len(start)] * branches for _ in videos]

    def run(self, new: list[list[list[int]]]) -> list[list[int]]:
        """Adds tokens to branches; returns the most likely next token of each, -1 where none was added."""
        tokens, owners, positions, last = [], [], [], []
        for lengths, branches in zip(self.lengths, new, strict=True):
            row: list[tuple[int, int, int]] = []
            ends = []
            for branch, added in enumerate(branches):
                row += [(token, branch, lengths[branch] + i) for i, token in enumerate(added)]
                lengths[branch] += len(added)
                ends.append(len(row) - 1 if added else -1)
            tokens.append([token for token, _, _ in row])
            owners.append([branch for _, branch, _ in row])
            positions.append([position for _, _, position in row])
            last.append(ends)
        # Padding belongs to a branch of its own, which has seen the video and nothing else.
        owner, before = _filled(owners, -1), self.owners.shape[1]
        self.owners = torch.cat([self.owners, owner], dim=1)
        seen = owner[:, :, None] == self.owners[:, None, :]
        seen[:, :, before:] &= torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool).tril()
        logits = self.forward.forward(_filled(tokens, 0), _filled(positions, 0), seen)
        best = logits.argmax(-1).tolist()
        return [[row[end] if end >= 0 else -1 for end in ends] for row, ends in zip(best, last, strict=True)]


def _filled(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


def weights_digest(model: torch.nn.Module) -> str:
    """Names the weights of a model, whatever directory they came from: 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, weights: str) -> dict[int, list[Output]]:
    header = {"specfuse": "outputs", "version": 1, "weights": weights, "longest": LONGEST}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n")
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        first, *lines = [json.loads(line) for line in whole.splitlines()]
        found = {clip: [Output(clip, *row) for row in rows] for clip, rows in lines}
        differs = {name for name, value in header.items() if first.get(name) != value}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of answers or is broken: {str(error)[:80]}") from None
    if differs & {"specfuse", "version"}:
        raise ValueError(f"{path} is no file of answers that this version reads")
    if differs:
        name = min(differs, key=["weights", "longest"].index)
        raise ValueError(f"{path} holds answers with {name}={first.get(name)!r}, not {header[name]!r}")
    if len(whole) < len(content):
        # What was being written when a run was interrupted.
        os.truncate(path, len(whole))
    return found
