"""What a head is worth on held-out clips: how often its drafts are right, and passes saved in real calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from specfuse.drafters import DraftHead, HeadDrafter
from specfuse.stats import GenerationStats
from specfuse.train.batches import pixels, prompt_end, prompt_start
from specfuse.train.clip_store import Clips
from specfuse.train.head_batches import Teacher
from specfuse.train.head_loss import count_hits
from specfuse.train.outputs import LONGEST, Output

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEPTH = 6
NODES = 16
CALLS = 60
MakeGenerator = Callable[..., Any]
"""``specfuse.SpeculativeGenerator``; training stands below generation, and is handed it to measure with."""


def measure(
    head: DraftHead,
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerFast,
    clips: Clips,
    outputs: Sequence[Output],
    generator: MakeGenerator,
    done: Callable[[float], object] = lambda share: None,
) -> dict[str, Any]:
    """Figures of a head.

    Args:
        head: on the target's device.
        teacher: knows the target, and the clips that outputs are about.
        tokenizer: the target's.
        clips: the clips.
        outputs: held out.
        generator: makes the generation loop.
        done: is told how much is done, 0 to 1.

    Returns:
        - ``acceptance_1`` ... ``acceptance_6``: how often the head's first choice at that depth is the
          target's, where those before were;
        - ``tokens_per_pass``: tokens that a pass of the target emits in real calls with trees of 16 drafts;
        - ``identical``: the share of those calls whose tokens are those of plain decoding;
        - ``draft_us``, ``pass_us``, ``plain_pass_us``: mean time per pass of drafting, of a pass with trees
          and of one without, bookkeeping included;
        - ``calls``, ``answers``, ``clips``, ``parameters``.
    """
    about = sorted({output.clip for output in outputs})
    hits, trials = torch.zeros(DEPTH), torch.zeros(DEPTH)
    for index, clip in enumerate(about):
        more = count_hits(head, teacher.model, teacher.about(clip), DEPTH)
        hits, trials = hits + more[0], trials + more[1]
        done(0.3 * (index + 1) / len(about))
    shares = (hits / trials.clamp(min=1)).tolist()
    figures: dict[str, Any] = {f"acceptance_{d}": round(x, 4) for d, x in enumerate(shares, start=1)}
    chosen = [outputs[i] for i in np.unique(np.linspace(0, len(outputs) - 1, CALLS).astype(int))]
    calls = _Calls(head, teacher, tokenizer, clips, generator)
    for index, output in enumerate(chosen):
        calls.answer(output)
        done(0.3 + 0.7 * (index + 1) / len(chosen))
    figures |= calls.figures() | {"answers": len(outputs), "clips": len(about)}
    figures["parameters"] = sum(parameter.numel() for parameter in head.parameters())
    return figures


class _Calls:
    """Answers by the generation loop, with the head and without, one after the other."""

    def __init__(
        self,
        head: DraftHead,
        teacher: Teacher,
        tokenizer: PreTrainedTokenizerFast,
        clips: Clips,
        generator: MakeGenerator,
    ):
        self.teacher, self.tokenizer, self.clips = teacher, tokenizer, clips
        self.loops = {
            "drafted": generator(teacher.model, HeadDrafter(head, teacher.model), max_nodes=NODES),
            "plain": generator(teacher.model, None),
        }
        self.stats: dict[str, list[GenerationStats]] = {name: [] for name in self.loops}
        self.identical = 0

    def answer(self, output: Output) -> None:
        """One call of each kind."""
        device = self.teacher.model.device
        position = self.clips.indices.tolist().index(output.clip)
        prompt = prompt_start(self.tokenizer) + prompt_end(self.tokenizer, output.question)
        ids = torch.tensor([prompt], device=device)
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values_videos": pixels(self.clips.frames[[position]]).to(device),
            "max_new_tokens": LONGEST,
            "do_sample": False,
        }
        events = self.teacher.events_of(output.clip)
        drafts = None if events is None else {"event_features": events[None].to(device)}
        drafted = self.loops["drafted"].generate(**inputs, draft_inputs=drafts)
        plain = self.loops["plain"].generate(**inputs)
        self.identical += bool(torch.equal(drafted, plain))
        for name, loop in self.loops.items():
            self.stats[name].append(loop.last_stats)

    def figures(self) -> dict[str, Any]:
        """See ``measure``."""
        found: dict[str, Any] = {}
        for name, all_stats in self.stats.items():
            passes = sum(stats.passes - 1 for stats in all_stats)  # the prompt's pass is another thing
            pass_ms = sum(stats.verify_ms + stats.commit_ms for stats in all_stats)
            found[f"{name}_us"] = round(1e3 * pass_ms / max(passes, 1))
            if name == "drafted":
                found["draft_us"] = round(1e3 * sum(s.draft_ms for s in all_stats) / max(passes, 1))
                tokens = sum(stats.tokens for stats in all_stats)
                found["tokens_per_pass"] = round(tokens / max(passes + len(all_stats), 1), 3)
        calls = len(self.stats["plain"])
        return {
            "tokens_per_pass": found["tokens_per_pass"],
            "draft_us": found["draft_us"],
            "pass_us": found["drafted_us"],
            "plain_pass_us": found["plain_us"],
            "identical": round(self.identical / max(calls, 1), 4),
            "calls": calls,
        }
