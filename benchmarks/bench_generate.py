"""End-to-end answers: specfuse against what users have today, tokens compared first.

    python benchmarks/bench_generate.py                              # the miniature, held-out clips
    python benchmarks/bench_generate.py --trace FILE [--size tiny]   # recorded answers replayed
    python benchmarks/bench_generate.py --input unpredictable        # nothing can be drafted
    ... [--prompt 171|2091|4643] [--nodes 16,auto] [--rounds N] [--only TEXT] [--csv DIR] [--device cuda]

Systems: model.generate as it is, with a static cache (compiled with --compile; replayed on a GPU always),
prompt lookup, assisted generation, and specfuse with each drafter. Every question goes through all of them in
turn, another one first each time; ratios are medians over questions. Timed is the call of generate: the
processor's work is everybody's. On a GPU two rows show what specfuse is without CUDA graphs.

"replayed": a model of real shape with random weights does all the work of every pass while a recorded answer
decides what it says, and so what is accepted (end_to_end/replayed.py): the time is that of the machine, the
acceptance that of real outputs. A recording is a file as for `specfuse replay`; the answers asked are spread
evenly over it, and "earlier answers" have been remembered as they would have been had all of it been asked.
"unpredictable" replays random tokens. Sizes and prompts: end_to_end/shapes.py.

Hugging Face's assisted generation hands its assistant the prompt's ids and no pixels, whatever the assistant
is: those rows are called blind, and one that sees the video does not exist. Prompt lookup may not draft the
video's placeholders, on which it would fail.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from end_to_end import inputs, lineups, shapes, table
from end_to_end.contest import CLOCKS, Differs, run, warm_up
from end_to_end.replayed import Script, hook_us
from end_to_end.systems import Asked, System, attend

from specfuse import demo
from specfuse.data import miniature
from specfuse.data.recording import load_recording
from specfuse.probe import pass_times

LENGTHS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


class Contest(NamedTuple):
    """What a run needs."""

    model: Any
    systems: list[System]
    warm: list[Asked]  # compared and not timed
    asked: list[Asked]
    name: dict[str, str]  # columns "input" and "model"
    script: Script | None = None


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", choices=["miniature", "unpredictable"], default="miniature")
    parser.add_argument("--trace", type=Path, help="a recording: its answers are replayed")
    parser.add_argument("--size", choices=shapes.SHAPES, default="tiny")
    parser.add_argument("--prompt", type=int, choices=shapes.PROMPTS, default=171)
    parser.add_argument("--clips", type=int, default=4, help="of the miniature's world")
    parser.add_argument("--questions", type=int, help="default: 6 a clip, 12 recorded answers")
    parser.add_argument("--longest", type=int, help="tokens of a recorded answer that are replayed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nodes", default="16,auto,4,8,32", help="of the corpus; all have the first two")
    parser.add_argument("--only", action="append", help="systems whose name holds this, and model.generate")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the static cache's decoding too"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: on a CPU that others use")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of models with random weights")
    parser.add_argument("--csv", type=Path, metavar="DIR", help="append to generate.csv and pass_times.csv")
    parser.add_argument("--no-pass-times", action="store_true", help="leave out T(n)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    if options.clock == "processor" and torch.device(options.device).type == "cuda":
        parser.error("--clock processor: a GPU works while its host waits; use wall")
    options.nodes = [size if size == "auto" else int(size) for size in options.nodes.split(",")]
    return options


def prepare(options: argparse.Namespace) -> Contest:
    """Target, competitors and questions.

    Raises:
        MemoryError, ValueError, OSError: says what is missing.
    """
    if options.trace is None and options.input == "miniature":
        model, processor = miniature.load_target()
        model.to(options.device)
        systems = lineups.miniature_lineup(model, processor, options.nodes, options.compile)
        draw = np.random.default_rng(options.seed)
        warm = inputs.miniature_questions(processor, [demo.ask(inputs.warm_clip(), 2, draw)])
        clips = demo.choose(options.clips, options.questions or 6, options.seed)
        asked = inputs.miniature_questions(processor, clips)
        name = {"input": "miniature", "model": "tiny-video-llava"}
        return Contest(model, systems, warm, asked, name)
    recording = inputs.unpredictable() if options.trace is None else load_recording(options.trace)
    prompt, shape = shapes.PROMPTS[options.prompt], shapes.SHAPES[options.size]
    model = shapes.build(shape, prompt, options.device, getattr(torch, options.dtype))
    script = Script(prompt.tokens + 1024, model.device)
    script.give(model)
    # Prompts of the miniature differ in length, and each length would be compiled: only where asked for.
    compiled = options.compile or model.device.type == "cuda"
    systems = lineups.replayed_lineup(model, options.nodes, compiled)
    count = options.questions or 12
    asked = inputs.replayed_questions(model, prompt, recording, count, script, options.longest)
    name = {"input": "unpredictable" if options.trace is None else "replayed"}
    return Contest(model, systems, asked[:2], asked, {**name, "model": f"{options.size}, random"}, script)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    try:
        contest = prepare(options)
        chosen = choose(contest.systems, options.only, options.device)
        peaks = warm_up(chosen, contest.warm)
        tell = quiet if options.json else progress
        found = run(chosen, contest.asked, options.rounds, CLOCKS[options.clock], tell)
    except (MemoryError, ValueError, OSError, Differs) as error:
        raise SystemExit(f"bench_generate: {error}") from None
    rows = table.rows(found, peaks)
    shared = table.about(
        contest.model,
        prompt_tokens=contest.asked[0].inputs["input_ids"].shape[1],
        questions=sum(each.scored for each in contest.asked),
        rounds=options.rounds,
        clock=options.clock,
        **contest.name,
    )
    clock = CLOCKS[options.clock]
    curve = [] if options.no_pass_times else curve_of(contest.model, contest.asked[0], clock)
    if options.csv is not None:
        table.append(options.csv / "generate.csv", table.ROW, shared, rows)
        table.append(options.csv / "pass_times.csv", table.PASS_ROW, shared, curve)
    if options.json:
        print(json.dumps({**shared, "rows": rows, "pass_times": curve}))
        return rows
    length, load = shared["prompt_tokens"], shared["load"]
    print(f"{shared['input']}, {shared['model']}, prompt of {length:,} tokens, {shared['dtype']}, ", end="")
    print(f"{shared['questions']} answers x {options.rounds}, {options.threads} thread(s), ", end="")
    print(f"{options.clock} time, load {load}")
    if contest.script is not None:
        costs = [hook_us(contest.script, n, shapes.VOCABULARY, contest.model.dtype) for n in (1, 17)]
        print(f"replaying adds {costs[0]:.0f} us to a pass of 1 node and {costs[1]:.0f} us to one of 17")
    print(table.markdown(rows))
    if curve:
        print("T(n) / T(1):", "  ".join(f"{1 + row['drafted']}: {row['ratio']:.2f}" for row in curve))
    return rows


def choose(systems: Sequence[System], only: Sequence[str] | None, device: str) -> list[System]:
    """The first system and those asked for, each with the attention that is its best on the device."""
    chosen = [
        system
        for place, system in enumerate(systems)
        if not place or not only or any(text in system.name for text in only)
    ]
    if torch.device(device).type == "cuda":
        for system in chosen:
            system.attention = "specfuse_tree" if system.name.startswith("specfuse") else "sdpa"
    return chosen


def curve_of(model: Any, asked: Asked, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """T(n): what a pass over n nodes costs behind this prompt."""
    asked.prepare()
    if model.device.type == "cuda":
        attend(model, "specfuse_tree")
    sample = {**asked.inputs, "max_new_tokens": max(asked.limit, 8), "do_sample": False}
    times = pass_times(model, [sample], LENGTHS, rounds=25, clock=clock)
    rows = [{"drafted": n, **table.percentiles([ms / 1e3 for ms in times[n]])} for n in LENGTHS]
    return [{**row, "ratio": round(row["p50_ms"] / rows[0]["p50_ms"], 3)} for row in rows]


def progress(place: int, asked: Asked) -> None:
    print(f"\r{place + 1} questions ", end="", file=sys.stderr, flush=True)


def quiet(place: int, asked: Asked) -> None:
    pass


if __name__ == "__main__":
    main()
