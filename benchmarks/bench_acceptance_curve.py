"""Speed-up against acceptance: drafts of which a given share is right, on real compute.

    python benchmarks/bench_acceptance_curve.py [--size tiny] [--prompt 171] [--grid] [--csv DIR]

"simulated": which drafts are right is drawn (exactly that share of an answer's places), not drafted, and
drafting costs nothing; what the target does for them is real, a model of real shape with random weights
(end_to_end/shapes.py). Drafts are chains. Hugging Face's assisted generation gets the very same drafts from a
model of one narrow layer, so its column is what its loop makes of them.

The published table that stands beside is 1.45x at 60 % acceptance and 4 drafts, 1.82x at 70 % and 8, 2.35x at
80 % and 16, 2.67x at 90 % and 16 with the clip cached; --grid adds acceptances. Every answer is compared
with model.generate's. Ratios are those of sums over all answers, which take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from end_to_end import inputs, shapes, table
from end_to_end.contest import CLOCKS, Differs, Timed, run, warm_up
from end_to_end.replayed import Script, imperfect
from end_to_end.simulated import SimulatedDrafter
from end_to_end.systems import GENERATE, PLAIN, Asked, HuggingFace, Specfuse, System, assisted
from environment import COLUMNS
from transformers import LlamaConfig, LlamaForCausalLM

SPECFUSE, ASSISTED = "specfuse", "HF assisted"
RATIOS = ("over_plain", "over_generate", "assisted_over_generate", "whole_over_generate")
RATIOS += ("cached_over_generate",)
ROW = (*COLUMNS, *table.ABOUT, "acceptance", "drafts", "tokens_per_pass", "expected", *RATIOS)
ROW += ("published", "published_cached")


class Point(NamedTuple):
    """One row: how often a draft is right, how many a pass carries, and what was published for it."""

    acceptance: float
    drafts: int
    published: float | None = None
    cached: bool = False  # the published figure

    @property
    def expected(self) -> float:
        """Tokens per pass of a long answer: (1 - a^(n+1)) / (1 - a)."""
        a, n = self.acceptance, self.drafts
        return n + 1 if a == 1 else (1 - a ** (n + 1)) / (1 - a)


PUBLISHED = [
    *(Point(0.6, 4, 1.45), Point(0.7, 8, 1.82)),
    *(Point(0.8, 16, 2.35), Point(0.9, 16, 2.67, cached=True)),
]


def grid() -> list[Point]:
    """More acceptances for each number of drafts."""
    known = {(point.acceptance, point.drafts) for point in PUBLISHED}
    points = [Point(rate / 10, drafts) for drafts in (4, 8, 16) for rate in (0, 2, 4, 6, 7, 8, 9, 10)]
    return [*PUBLISHED, *(point for point in points if point[:2] not in known)]


class Bench:
    """The target, an assistant for Hugging Face's loop, and the four who answer.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace):
        prompt, shape = shapes.PROMPTS[options.prompt], shapes.SHAPES[options.size]
        self.model = shapes.build(shape, prompt, options.device, getattr(torch, options.dtype))
        self.script, self.drafts = (Script(prompt.tokens + 1024, self.model.device) for _ in range(2))
        self.script.give(self.model)
        self.assistant = small_model(self.model)
        self.drafts.give(self.assistant)
        self.drafter = SimulatedDrafter()
        self.answers = inputs.unpredictable(options.answers, options.new_tokens)
        self.prompt, self.options = prompt, options

    def systems(self, point: Point) -> list[System]:
        """model.generate, plain decoding, specfuse and assisted generation with the point's drafts."""
        settings = self.assistant.generation_config
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = point.drafts, "constant"
        settings.assistant_confidence_threshold = 0.0
        found: list[System] = [
            HuggingFace(GENERATE, self.model),
            Specfuse(PLAIN, self.model, lambda: None),
            Specfuse(SPECFUSE, self.model, lambda: self.drafter, point.drafts),
        ]
        if not self.options.no_assisted:
            found.append(assisted(ASSISTED, self.model, self.assistant))
        if self.model.device.type == "cuda":
            for system in found:
                system.attention = "specfuse_tree" if isinstance(system, Specfuse) else "sdpa"
        return found

    def questions(self, point: Point) -> list[Asked]:
        """Every answer twice: about a new clip, and as the answer to a second question about it."""
        questions = []
        for number, sample in enumerate(self.answers.samples):
            for turn in (0, 1):
                asked = inputs.inputs_of(self.model, self.prompt, [], number, turn)
                seed = 2 * number + turn
                line = imperfect(sample.target, point.acceptance, seed, shapes.VOCABULARY)

                def prepare(answer: Sequence[int] = sample.target, line: list[int] = line) -> None:
                    self.script.write(self.prompt.tokens, answer)
                    self.drafts.write(self.prompt.tokens, line)
                    self.drafter.line = line

                questions.append(Asked(number, turn, asked, len(line), prepare=prepare))
        return questions

    def measure(self, point: Point) -> dict[str, Any]:
        """One row."""
        systems, questions = self.systems(point), self.questions(point)
        warm_up(systems, questions[:1], memory=False)
        return row_of(point, run(systems, questions, self.options.rounds, CLOCKS[self.options.clock]))


def small_model(target: Any) -> LlamaForCausalLM:
    """One narrow layer with the target's vocabulary: the cheapest assistant that Hugging Face takes."""
    config = LlamaConfig(
        vocab_size=shapes.VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=shapes.LONGEST,
    )
    model = LlamaForCausalLM(config).eval().to(target.device, target.dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def row_of(point: Point, found: dict[str, list[Timed]]) -> dict[str, Any]:
    """What was published stands beside; a clip is cold in turn 0 and cached in turn 1."""

    def ratio(theirs: str, ours: str, decode: bool = True, turn: int | None = None) -> float | str:
        if ours not in found:
            return ""
        chosen = [i for i, each in enumerate(found[ours]) if turn is None or each.turn == turn]
        sums = [
            sum(table.decode_seconds(found[s][i]) if decode else found[s][i].seconds for i in chosen)
            for s in (theirs, ours)
        ]
        return round(sums[0] / sums[1], 3)

    ours = found[SPECFUSE]
    return {
        "acceptance": point.acceptance,
        "drafts": point.drafts,
        "tokens_per_pass": round(sum(t.tokens for t in ours) / sum(t.passes for t in ours), 3),
        "expected": round(point.expected, 3),
        "over_plain": ratio(PLAIN, SPECFUSE),
        "over_generate": ratio(GENERATE, SPECFUSE),
        "assisted_over_generate": ratio(GENERATE, ASSISTED),
        "whole_over_generate": ratio(GENERATE, SPECFUSE, decode=False, turn=0),
        "cached_over_generate": ratio(GENERATE, SPECFUSE, decode=False, turn=1),
        "published": point.published or "",
        "published_cached": point.cached,
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| acceptance (simulated) | drafts | published | whole answer, new clip | whole answer, cached clip "
        "| decoding over `model.generate` | over own plain decoding | HF assisted, same drafts "
        "| tokens per pass (expected) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        published = f"{row['published']:.2f}x" if row["published"] != "" else ""
        published += " (cached)" if row["published_cached"] else ""
        names = ("whole_over_generate", "cached_over_generate", "over_generate", "over_plain")
        ratios = [f"{row[name]:.2f}x" for name in names]
        theirs = row["assisted_over_generate"]
        ratios.append(f"{theirs:.2f}x" if theirs != "" else "")
        tokens = f"{row['tokens_per_pass']:.2f} ({row['expected']:.2f})"
        cells = [f"{row['acceptance']:.0%}", str(row["drafts"]), published, *ratios, tokens]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=shapes.SHAPES, default="tiny")
    parser.add_argument("--prompt", type=int, choices=shapes.PROMPTS, default=171)
    parser.add_argument("--grid", action="store_true", help="more acceptances than the published table has")
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-assisted", action="store_true", help="leave out Hugging Face's loop")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: on a CPU that others use")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--csv", type=Path, metavar="DIR", help="append to acceptance_curve.csv there")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        bench = Bench(options)
        rows = []
        for point in grid() if options.grid else PUBLISHED:
            rows.append(bench.measure(point))
            if not options.json:
                print(f"\r{len(rows)} rows ", end="", file=sys.stderr, flush=True)
    except (MemoryError, ValueError, Differs) as error:
        raise SystemExit(f"bench_acceptance_curve: {error}") from None
    shared = table.about(
        bench.model,
        input="simulated",
        model=f"{options.size}, random",
        prompt_tokens=bench.prompt.tokens,
        questions=2 * options.answers,
        rounds=options.rounds,
        clock=options.clock,
    )
    if options.csv is not None:
        table.append(options.csv / "acceptance_curve.csv", ROW, shared, rows)
    if options.json:
        print(json.dumps({**shared, "rows": rows}))
    else:
        print(f"{shared['model']}, prompt of {shared['prompt_tokens']:,} tokens, {shared['dtype']}, ", end="")
        print(f"{shared['questions']} answers x {options.rounds}, load {shared['load']}")
        print(markdown(rows))
    return rows


if __name__ == "__main__":
    main()
