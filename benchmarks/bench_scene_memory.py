"""Does it help to draft from the answers about similar earlier scenes? Tokens per pass on held-out scenes.

    python benchmarks/bench_scene_memory.py [--known 600] [--asked 40] [--nodes 16] [--out DIR] [--quick]

The shipped target's own answers to every question about ``--known`` training clips are remembered; then
``--asked`` held-out clips are asked about. Passes are replayed: a pass emits the drafted tokens that agree
with the recorded answer, and one more. Every row has seen the same answers; only their order differs.

    one question    each question alone, nothing is learned on the way
    a session       all questions about a scene, one after the other, learned as they are answered
    cold            known and asked clips mixed, four questions each, nothing is known at the start
    gain            over the corpus with the same answers, with its 90 % interval (bootstrap over scenes)

Rows differ in what two scenes are compared by. "random" is the control, "true facts" and "the answers" are
oracles that nobody has while drafting. "toward video" and "toward answers" are linear adapters fitted by
ridge regression on the known clips: to the target's own video features, and to a 64-dimensional summary (SVD)
of what the target said. --adapter takes one of ``specfuse train adapter --features pooled`` for the former.
The last lines time the index of a scene, and whole answers of the real model. Answers and features are taken
from the cache; where they are missing they are computed first, which takes minutes.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from environment import COLUMNS, environment
from torch import Tensor

from specfuse.adapters import LinearAdapter, LinearAdapterConfig, load_adapter
from specfuse.cli.train import default_cache
from specfuse.data import miniature
from specfuse.drafters import CorpusDrafter, Drafter, DraftState, SceneMemory
from specfuse.drafters.scene_memory import FEATURES
from specfuse.generate import SpeculativeGenerator
from specfuse.models.checkpoint import load_eventgpt
from specfuse.train.adapter_features import encoder_pairs
from specfuse.train.batches import pixels, prompt_end, prompt_start
from specfuse.train.labels import FACTS
from specfuse.train.outputs import LONGEST, Output, world_outputs
from specfuse.vision.cache import patched

RIDGE = 300.0
SUMMARY = 64


class World(NamedTuple):
    """Scenes with what was said about them; the first ``known`` are remembered."""

    known: int
    answers: list[list[tuple[list[int], list[int]]]]  # per scene: question and answer
    events: Tensor  # [C, I] pooled features of the events
    video: Tensor  # [C, D] of the target
    facts: Tensor  # [C, F] one-hot


class View(NamedTuple):
    """What scenes are compared by."""

    name: str
    asked: Tensor  # [C, I] features of the scenes as a call gives them
    adapter: Any = None
    remembered: Tensor | None = None  # [C, D] as the memory knows them, where that is something else


def load_world(known: int, asked: int, questions: int | None) -> tuple[World, Any, Any, Any]:
    target, processor = miniature.load_target()
    eventgpt, _ = load_eventgpt(miniature.directory("tiny-eventgpt-naive"), dtype=torch.float32)
    tokenizer, cache = processor.tokenizer, default_cache()
    clips, outputs = world_outputs(target, tokenizer, 4166, (known, asked), cache)
    start = [t for t in prompt_start(tokenizer) if t != tokenizer.convert_tokens_to_ids("<video>")]
    said: dict[int, list[Output]] = {}
    for output in outputs:
        said.setdefault(output.clip, []).append(output)
    answers = [
        [(start + prompt_end(tokenizer, o.question), o.tokens) for o in said[int(clip)][:questions]]
        for clip in clips.indices
    ]
    pairs = encoder_pairs("pooled", target, eventgpt, clips.indices, cache)
    one_hot = [
        torch.nn.functional.one_hot(torch.from_numpy(column).long() + 1, count + 1)[:, 1:]
        for column, count in zip(clips.facts.T, FACTS.values(), strict=True)
    ]
    facts = torch.cat(one_hot, 1).float()
    world = World(known, answers, pairs.source.float(), pairs.target.float(), facts)
    return world, target, processor, clips


def ridge(source: Tensor, wanted: Tensor) -> LinearAdapter:
    """A linear adapter from standardised ``source`` to ``wanted``."""
    mean, scale = source.mean(0), source.std(0) + 1e-6
    x, centre = ((source - mean) / scale).double(), wanted.mean(0)
    normal = x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
    weight = (torch.linalg.solve(normal, x.T @ (wanted - centre).double()).T / scale).float()
    adapter = LinearAdapter(LinearAdapterConfig(in_features=source.shape[1], features=wanted.shape[1]))
    with torch.no_grad():
        adapter.linear.weight.copy_(weight)
        adapter.linear.bias.copy_(centre - weight @ mean)
    return adapter.eval()


def summaries(answers: Sequence[list[tuple[list[int], list[int]]]], known: int) -> Tensor:
    """``[C, SUMMARY]``: which pairs and fours of tokens a scene's answers have, reduced on known scenes."""
    bags = [
        Counter(tuple(t[i : i + n]) for _, t in rows for n in (2, 4) for i in range(len(t) - n + 1))
        for rows in answers
    ]
    scenes_of = Counter(gram for bag in bags[:known] for gram in bag)
    columns = {gram: i for i, gram in enumerate(g for g, count in scenes_of.items() if count >= 3)}
    table = torch.zeros(len(bags), len(columns))
    for row, bag in enumerate(bags):
        for gram, count in bag.items():
            if gram in columns:
                table[row, columns[gram]] = min(count, 3) * np.log(known / scenes_of[gram])
    table = torch.nn.functional.normalize(table)
    table -= table[:known].mean(0)
    torch.manual_seed(0)
    _, _, axes = torch.svd_lowrank(table[:known], min(SUMMARY, known - 1), niter=6)
    return table @ axes


def views(world: World, adapter: Path | None) -> list[View]:
    known = slice(0, world.known)
    toward_video = load_adapter(adapter) if adapter else ridge(world.events[known], world.video[known])
    summary = summaries(world.answers, world.known)
    random = torch.randn(world.events.shape, generator=torch.Generator().manual_seed(0))
    return [
        View("random", random),
        View("events", world.events),
        View("events toward video", world.events, toward_video),
        View("events toward video, known by video", world.events, toward_video, world.video),
        View("events toward answers", world.events, ridge(world.events[known], summary[known])),
        View("video", world.video),
        View("video toward answers", world.video, ridge(world.video[known], summary[known])),
        View("true facts (oracle)", world.facts),
        View("the answers (oracle)", summary),
    ]


def memory_of(world: World, view: View, **options: Any) -> SceneMemory:
    options = {"max_tokens": 4_000_000, "background": False, **options}
    memory = SceneMemory(adapter=view.adapter, **options)
    for scene in range(world.known):
        aligned = view.remembered is not None
        features = view.asked[scene] if view.remembered is None else view.remembered[scene]
        for question, tokens in world.answers[scene]:
            memory.remember(features, tokens, question, aligned=aligned)
    return memory


def passes(
    drafter: Drafter, question: list[int], tokens: list[int], features: Tensor, nodes: int, learns: bool
) -> int:
    """Target passes that an answer takes."""
    state = DraftState([question], [[]], [True], [len(tokens)], draft_inputs={FEATURES: features[None]})
    answer, count = state.answers[0], 0
    while state.remaining[0]:
        tree = drafter.propose(state, nodes)
        at, done = 0, len(answer)
        rows = zip(tree.tokens[0, 1:].tolist(), tree.parents[0, 1:].tolist(), strict=True)
        # A node comes after its parent, so that one walk over the nodes follows the path.
        for node, (token, parent) in enumerate(rows, start=1):
            if parent == at and done < len(tokens) - 1 and token == tokens[done]:
                at, done = node, done + 1
        answer += tokens[len(answer) : done + 1]
        state.remaining[0] = len(tokens) - len(answer)
        count += 1
    if learns:
        drafter.learn(state)
    return count


def play(
    world: World,
    drafter: Drafter,
    features: Tensor,
    scenes: Sequence[int],
    nodes: int,
    learns: bool,
    questions: int | None = None,
) -> np.ndarray:
    """``[scenes, 2]``: tokens and passes of each."""
    figures = []
    for scene in scenes:
        rows = world.answers[scene][:questions]
        counts = [passes(drafter, q, t, features[scene], nodes, learns) for q, t in rows]
        figures.append((sum(len(t) for _, t in rows), sum(counts)))
    return np.array(figures)


def compared(figures: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Tokens per pass, the gain over ``base`` and its 90 % interval."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(base), size=(2000, len(base)))
    rates = [np.divide(*x[drawn].sum(1).T) for x in (figures, base)]
    low, high = np.percentile(rates[0] / rates[1] - 1, (5, 95))
    rate, before = (float(np.divide(*x.sum(0))) for x in (figures, base))
    return {"tokens_per_pass": rate, "gain": rate / before - 1, "low": float(low), "high": float(high)}


def warm(world: World, rows: list[View], nodes: int) -> list[dict[str, Any]]:
    scenes, table = range(world.known, len(world.answers)), []
    corpus = memory_of(world, View("", world.events)).corpus
    bases = [play(world, corpus, world.events, scenes, nodes, learns) for learns in (False, True)]
    for view in [View("corpus", world.events), *rows]:
        drafter: Any = None if view.name == "corpus" else memory_of(world, view)
        for part, learns, base in zip(("one question", "a session"), (False, True), bases, strict=True):
            figures = base if drafter is None else play(world, drafter, view.asked, scenes, nodes, learns)
            table.append({"part": part, "compared by": view.name, **compared(figures, base)})
            show(table[-1])
    return table


def cold(world: World, rows: list[View], nodes: int) -> list[dict[str, Any]]:
    order = np.random.default_rng(0).permutation(len(world.answers)).tolist()
    base = play(world, CorpusDrafter(4_000_000), world.events, order, nodes, True, 4)
    table = [{"part": "cold", "compared by": "corpus", **compared(base, base)}]
    show(table[-1])
    for view in rows:
        figures = play(
            world, SceneMemory(max_tokens=4_000_000, background=False), view.asked, order, nodes, True, 4
        )
        table.append({"part": "cold", "compared by": view.name, **compared(figures, base)})
        show(table[-1])
    return table


def show(row: dict[str, Any]) -> None:
    gain = f"{row['gain']:+.1%} ({row['low']:+.1%} to {row['high']:+.1%})" if row["gain"] else ""
    print(f"| {row['part']} | {row['compared by']} | {row['tokens_per_pass']:.2f} | {gain} |", flush=True)


def sizes(world: World, view: View, nodes: int, tokens: Sequence[int]) -> None:
    """What ``nearest_tokens`` costs and brings."""
    scenes = range(world.known, len(world.answers))
    for count in tokens:
        memory, times = memory_of(world, view, nearest_tokens=count), []
        for scene in scenes:
            state = DraftState([[1]], [[]], [True], [9], draft_inputs={FEATURES: view.asked[scene, None]})
            start = time.process_time()
            memory.propose(state, 1)
            times.append(1e3 * (time.process_time() - start))
        rate = float(np.divide(*play(world, memory, view.asked, scenes, nodes, False).sum(0)))
        made = f"index of a scene {statistics.median(times):.1f} ms of processor time"
        print(f"nearest_tokens={count}: {rate:.2f} tokens per pass, {made}", flush=True)


def timed(
    world: World, view: View, target: Any, clips: Any, start: list[int], nodes: int
) -> dict[str, float]:
    """The real model, six questions a scene, corpus and memory in turn; tokens are compared."""
    memory = memory_of(world, view, background=True)
    drafters: list[tuple[Drafter, bool]] = [(memory_of(world, view).corpus, False)]
    drafters.append((memory, True))
    seconds: list[list[float]] = [[], []]
    # Of a question as drafters know it: without the video's placeholders.
    text_start = sum(token != target.config.video_token_index for token in start)
    with patched(target):
        for scene in range(world.known, len(world.answers)):
            video = pixels(clips.frames[scene][None])
            for place, (question, tokens) in enumerate(world.answers[scene][:6]):
                ids = torch.tensor([start + question[text_start:]])
                options = {"input_ids": ids, "pixel_values_videos": video, "do_sample": False}
                target.generate(**options, max_new_tokens=1)  # the clip's row in the vision cache
                for turn in (0, 1) if place % 2 else (1, 0):
                    drafter, looks = drafters[turn]
                    generator = SpeculativeGenerator(target, drafter, max_nodes=nodes)
                    given = {FEATURES: view.asked[scene, None]} if looks else None
                    before = time.perf_counter()
                    got = generator.generate(draft_inputs=given, max_new_tokens=LONGEST, **options)
                    seconds[turn].append(time.perf_counter() - before)
                    if got[0, ids.shape[1] :].tolist() != tokens:
                        raise SystemExit(f"other tokens than recorded about clip {clips.indices[scene]}")
    ratios = [theirs / ours for theirs, ours in zip(*seconds, strict=True)]
    return {"answers": len(ratios), "in all": sum(seconds[0]) / sum(seconds[1])} | {
        "median": statistics.median(ratios),
        "median of later questions": statistics.median(r for i, r in enumerate(ratios) if i % 6),
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--known", type=int, default=600)
    parser.add_argument("--asked", type=int, default=40)
    parser.add_argument("--questions", type=int, help="per scene; all if not given")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--out", type=Path, help="directory for scene_memory.csv")
    parser.add_argument("--quick", action="store_true", help="6 clips, 2 questions: does it run?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.known, options.asked, options.questions = 4, 2, 2
    world, target, processor, clips = load_world(options.known, options.asked, options.questions)
    rows = views(world, options.adapter)
    print("| part | scenes compared by | tokens per pass | gain over the corpus |\n|---|---|---|---|")
    table = warm(world, rows, options.nodes) + cold(world, rows[:2] + rows[5:6], options.nodes)
    sizes(world, rows[1], options.nodes, [2**14, 2**16, 2**18])
    ratios = timed(world, rows[1], target, clips, prompt_start(processor.tokenizer), options.nodes)
    print("real model, speed over the corpus's:", ", ".join(f"{k} {v:.4g}" for k, v in ratios.items()))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "scene_memory.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, (*COLUMNS, "nodes", *table[0]))
            writer.writeheader()
            where = environment()
            for row in table:
                rounded = {k: v if isinstance(v, str) else f"{v:.4g}" for k, v in row.items()}
                writer.writerow({**where, "nodes": options.nodes, **rounded})
    return table


if __name__ == "__main__":
    main()
