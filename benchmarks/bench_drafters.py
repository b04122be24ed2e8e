"""The table of drafters: what each is worth for one target, on held-out scenes of the driving world.

    python benchmarks/bench_drafters.py [--clips 8] [--questions 6] [--nodes 16] [--out DIR] [--quick]

Every question goes through model.generate and through specfuse with every drafter, the same inputs, one after
the other, another one first each time; a drafter whose tokens differ ends the run. All specfuse rows find the
clip in the vision cache; model.generate encodes it, as it always does. Warm-up runs on a training clip with
drafters of its own, so that "cold" means cold.

    acceptance       accepted of the drafted nodes (a tree holds alternatives: they can not all be accepted)
    tokens per pass  emitted tokens per forward pass of the target, the prefill included
    cost ratio       time of drafting per pass over the time of a plain pass of the target
    over plain       median over questions of plain decoding's time over the drafter's, whole call
    over generate    the same against model.generate

Rows whose weights are not given and do not ship are left out and named. --model, --corpus, --naive,
--distilled, --head and --head-events take directories (--corpus a file) other than the shipped ones; a head
with events is given those of the naive EventGPT. --compression, which does not ship, takes an adapter that
specfuse train adapter --kind compression trained behind the distilled EventGPT. Rows that see events encode
them at a clip's first question.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from environment import COLUMNS, environment

import specfuse
from specfuse.adapters import CompressionDrafter, load_adapter
from specfuse.data import miniature
from specfuse.data.world import events, split
from specfuse.demo import LONGEST, AskedClip, ask, choose
from specfuse.drafters import CombinedDrafter, CorpusDrafter, Drafter, HeadDrafter, PromptLookupDrafter
from specfuse.drafters.block import BlockDrafter
from specfuse.generate import SpeculativeGenerator
from specfuse.models import checkpoint
from specfuse.session import FIRST_TURN
from specfuse.stats import GenerationStats
from specfuse.vision.cache import patch

FIGURES = ("acceptance", "tokens_per_pass", "cost_ratio", "over_plain", "over_generate")
PLAIN = "none (plain decoding)"


class Sees:
    """Events of clips for drafters that look at them: encoded at a clip's first question, then kept.

    A camera records the events; simulating them, in ``prepare``, is nobody's cost.
    """

    def __init__(self, drafter: Any):
        self.drafter = drafter
        self.streams: dict[int, Any] = {}
        self.seen: dict[int, Mapping[str, Any]] = {}

    def prepare(self, clip: int) -> None:
        if clip not in self.streams:
            self.streams[clip] = events(clip)

    def __call__(self, clip: int) -> Mapping[str, Any]:
        if clip not in self.seen:
            self.seen[clip] = self.drafter.see(self.streams[clip])
        return self.seen[clip]


class Row(NamedTuple):
    """A drafter of the table."""

    name: str
    drafter: Drafter | None
    sees: Sees | None = None


class Measured(NamedTuple):
    """What one row took, question by question."""

    seconds: list[float]
    stats: list[GenerationStats]


def table_rows(target: Any, processor: Any, options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Fresh drafters for every row whose weights are there, and the names of the other rows."""

    def load(name: str, given: Path | None, make: Callable[[Path], Any]) -> Any:
        return weights(name, given, options.model is not None, make)

    def load_head(path: Path) -> HeadDrafter:
        return HeadDrafter.from_pretrained(path, target)

    def load_eventgpt(path: Path) -> Drafter:
        return specfuse.EventDrafter(*checkpoint.load_eventgpt(path, dtype=torch.float32), processor)

    naive = load("eventgpt-naive", options.naive, load_eventgpt)
    distilled = load("eventgpt", options.distilled, load_eventgpt)
    head = load("head", options.head, load_head)
    fused = load("head-events", options.head_events, load_head)
    corpus, more = (load("corpus", options.corpus, load_corpus) for _ in range(2))
    eyes = naive or distilled
    blocks = None
    if options.compression is not None and distilled is not None:
        adapter = load_adapter(options.compression)
        if not isinstance(adapter, CompressionDrafter):
            raise SystemExit(f"--compression must hold a compression adapter, not {type(adapter).__name__}")
        blocks = BlockDrafter(adapter, distilled)
    parts = [more or CorpusDrafter(), PromptLookupDrafter(), *([head] if head else [])]
    found: dict[str, Row | None] = {
        PLAIN: Row("", None),
        "prompt lookup": Row("", PromptLookupDrafter()),
        "EventGPT, its own short answers": naive and Row("", naive, Sees(naive)),
        "EventGPT, distilled": distilled and Row("", distilled, Sees(distilled)),
        "events, 16 tokens at once": blocks and Row("", blocks, Sees(distilled)),
        "head": head and Row("", head),
        "head and events": fused and eyes and Row("", fused, Sees(eyes)),
        "corpus, cold": Row("", CorpusDrafter()),
        "corpus, warm (answers on training clips)": corpus and Row("", corpus),
        "combined: corpus, lookup" + (", head" if head else ""): Row("", CombinedDrafter(parts)),
    }
    rows = [row._replace(name=name) for name, row in found.items() if row is not None]
    return rows, [name for name, row in found.items() if row is None]


def weights(name: str, given: Path | None, other_model: bool, load: Callable[[Path], Any]) -> Any:
    """What ``load`` makes of a directory, given or shipped as tiny-NAME; None where there is none.

    What ships belongs to the shipped target; another one gets what is given alone.
    """
    if given is None and (other_model or f"tiny-{name}" not in miniature.shipped()):
        return None
    return load(given or miniature.directory(f"tiny-{name}"))


def load_corpus(path: Path) -> CorpusDrafter:
    return CorpusDrafter().load(path / miniature.CORPUS_FILE if path.is_dir() else path)


class Table:
    """Runs the questions and keeps what each row took."""

    def __init__(self, model: Any, processor: Any, nodes: int):
        self.plain, self.cached, self.processor, self.nodes = model, copy.deepcopy(model), processor, nodes
        patch(self.cached)
        self.turns = 0

    def run(self, rows: list[Row], clips: list[AskedClip]) -> tuple[list[float], list[Measured]]:
        """Seconds of model.generate, and what every row measured."""
        generators = [SpeculativeGenerator(self.cached, row.drafter, max_nodes=self.nodes) for row in rows]
        generate: list[float] = []
        measured = [Measured([], []) for _ in rows]
        for asked in clips:
            for question in asked.questions:
                text = FIRST_TURN.format(question=question.text)
                inputs = self.processor(text=text, videos=asked.frames, return_tensors="pt")
                options = {**inputs, "max_new_tokens": LONGEST, "do_sample": False}
                self.cached.generate(**{**options, "max_new_tokens": 1})  # the clip's row in the vision cache
                expected, seconds = timed(lambda options=options: self.plain.generate(**options))
                generate.append(seconds)
                for place in range(len(rows)):
                    index = (self.turns + place) % len(rows)
                    row, generator = rows[index], generators[index]
                    if row.sees is not None:
                        row.sees.prepare(asked.index)
                    got, seconds = timed(lambda r=row, g=generator, c=asked, o=options: call(r, g, c, o))
                    if not torch.equal(got, expected):
                        raise SystemExit(f"{row.name} gave other tokens than model.generate: {question.text}")
                    measured[index].seconds.append(seconds)
                    measured[index].stats.append(generator.last_stats)  # type: ignore[arg-type]
                self.turns += 1
        return generate, measured


def call(row: Row, generator: SpeculativeGenerator, asked: AskedClip, options: dict[str, Any]) -> Any:
    own = None if row.sees is None else row.sees(asked.index)
    return generator.generate(draft_inputs=own, **options)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def figures(measured: Measured, plain: Measured, generate: list[float]) -> dict[str, float]:
    """The columns of one row."""
    drafted, passes = (sum(getattr(s, name) for s in measured.stats) for name in ("drafted", "passes"))
    steps = sum(s.passes - 1 for s in plain.stats)
    step_ms = sum(s.verify_ms + s.commit_ms for s in plain.stats) / max(steps, 1)
    ratios = [
        statistics.median(theirs / ours for theirs, ours in zip(times, measured.seconds, strict=True))
        for times in (plain.seconds, generate)
    ]
    return {
        "acceptance": sum(s.accepted for s in measured.stats) / max(drafted, 1),
        "tokens_per_pass": sum(s.tokens for s in measured.stats) / passes,
        "cost_ratio": sum(s.draft_ms for s in measured.stats) / passes / step_ms,
        "over_plain": ratios[0],
        "over_generate": ratios[1],
    }


def markdown(table: list[tuple[str, dict[str, float]]]) -> str:
    lines = [
        "| drafter | acceptance | tokens per pass | cost ratio | over plain | over model.generate |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in table:
        acceptance = f"{row['acceptance']:.1%}" if row["acceptance"] or name != PLAIN else ""
        cost = f"{row['cost_ratio']:.2f}" if name != PLAIN else ""
        rest = f"{row['over_plain']:.2f}x | {row['over_generate']:.2f}x"
        lines.append(f"| {name} | {acceptance} | {row['tokens_per_pass']:.2f} | {cost} | {rest} |")
    return "\n".join(lines)


def write_csv(path: Path, table: list[tuple[str, dict[str, float]]], nodes: int, questions: int) -> None:
    """Appends the rows with machine and versions."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, "drafter", "nodes", "questions", *FIGURES))
        if new:
            writer.writeheader()
        where = environment()
        for name, row in table:
            rounded = {key: f"{value:.4g}" for key, value in row.items()}
            writer.writerow({**where, "drafter": name, "nodes": nodes, "questions": questions, **rounded})


def main(arguments: list[str] | None = None) -> list[tuple[str, dict[str, float]]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="1 clip, 2 questions: does it run?")
    parser.add_argument("--out", type=Path, help="directory for drafters.csv and drafters.md")
    for name in ("model", "corpus", "naive", "distilled", "head", "head-events", "compression"):
        parser.add_argument(f"--{name}", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.clips, options.questions = 1, 2
    if options.model is None:
        model, processor = miniature.load_target()
    else:
        model, processor = checkpoint.load_video_llava(options.model, dtype=torch.float32)
    bench = Table(model, processor, options.nodes)
    bench.run(
        table_rows(model, processor, options)[0], [ask(int(split("train")[0]), 2, np.random.default_rng(0))]
    )
    rows, missing = table_rows(model, processor, options)
    chosen = choose(options.clips, options.questions, options.seed)
    generate, measured = bench.run(rows, chosen)
    plain = measured[[row.name for row in rows].index(PLAIN)]
    table = [(row.name, figures(taken, plain, generate)) for row, taken in zip(rows, measured, strict=True)]
    text = markdown(table)
    print(text)
    print(f"\n{len(generate)} questions about {len(chosen)} held-out clips, {options.nodes} nodes a pass")
    if missing:
        print(f"left out, no weights: {', '.join(missing)}", file=sys.stderr)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_csv(options.out / "drafters.csv", table, options.nodes, len(generate))
        (options.out / "drafters.md").write_text(text + "\n")
    return table


if __name__ == "__main__":
    main()
