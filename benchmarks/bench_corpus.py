"""The remembering drafter: speed and memory of its index, and tokens per pass on recorded answers.

    python benchmarks/bench_corpus.py [--tokens 1000000] [--json] [--no-figures]

Speed is measured through the binding, one call per answer or tree, on an index of --tokens tokens. Promised
are a 32-node tree in at most 50 us (median), 1,000,000 learned tokens/s and 100 bytes per token. Inputs, all
but the first synthetic:

  real spliced   recorded answers: the beginning of one, the end of another, 3 % of the tokens replaced
  grammar        captions of specfuse.data.make_recording
  random 32000   tokens without any pattern: the worst case for memory
  random 50      the same from a small vocabulary: every short context has many successors

Figures are replayed answers (verify_tree decides, no model runs): cold start, each answer learned after its
last pass. `file` is the recording's order, `shuffled` the mean of five, `first` and `second` its halves from
a cold start each, `continued` the second half after learning the first, `frozen` the same without learning
on, `evidence` with the other model's answer on the same clip as a hint. Recorded data is looked for at
../shared/data (SPECFUSE_SHARED_DATA).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from specfuse.data.make_recording import make_recording
from specfuse.data.recording import Recording, load_recording
from specfuse.drafters import CorpusDrafter
from specfuse.ops import native
from specfuse.replay import replay, shuffled

LIMITS = {"propose_us_p50": 50.0, "learn_tokens_per_s": 1e6, "bytes_per_token": 100.0}
NODES, DEPTH, ANSWER, TREES = 32, 50, 50, 2000
REPOSITORY = Path(__file__).resolve().parents[1]

Answers = list[np.ndarray]


def real_recording() -> Recording | None:
    folder = Path(os.environ.get("SPECFUSE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    path = folder / "video_llava_dsec_1s_tokens.json"
    return load_recording(path) if path.exists() else None


def spliced(recording: Recording, count: int, rng: np.random.Generator) -> Answers:
    answers = [np.array(sample.target, dtype=np.int32) for sample in recording.samples]
    made = []
    for first, second in rng.integers(0, len(answers), (count, 2)):
        cut = int(rng.integers(0, len(answers[first])))
        answer = np.concatenate([answers[first][:cut], answers[second][cut:]])
        noisy = rng.random(len(answer)) < 0.03
        answer[noisy] = rng.integers(0, 32_000, int(noisy.sum()))
        made.append(answer)
    return made


def inputs(tokens: int) -> dict[str, Answers]:
    """Answers of about ``tokens`` tokens each."""
    count = -(-tokens // ANSWER)
    rng = np.random.default_rng(0)
    made = {}
    if (recording := real_recording()) is not None:
        made["real spliced"] = spliced(recording, count, rng)
    captions = make_recording(samples=count)["samples"][:count]
    made["grammar"] = [np.array(sample["target"], dtype=np.int32) for sample in captions]
    for vocabulary in (32_000, 50):
        drawn = rng.integers(0, vocabulary, (count, ANSWER)).astype(np.int32)
        made[f"random {vocabulary}"] = list(drawn)
    return made


def measure(name: str, answers: Answers) -> dict[str, str | float]:
    tokens = sum(map(len, answers))
    index = native.cpu.CorpusIndex(tokens)
    start = time.perf_counter()
    for answer in answers:
        index.observe(answer)
    learn_s = time.perf_counter() - start
    assert index.num_tokens == tokens
    rng = np.random.default_rng(1)
    times, nodes = [], []
    for which in rng.integers(0, len(answers), TREES):
        answer = answers[which][: int(rng.integers(0, len(answers[which])))]
        start = time.perf_counter()
        drafted = index.propose(answer, max_nodes=NODES, max_depth=DEPTH)
        times.append((time.perf_counter() - start) * 1e6)
        nodes.append(len(drafted[0]))
    p20, p50, p80 = np.percentile(times, [20, 50, 80])
    return {
        "case": name,
        "tokens": tokens,
        "propose_us_p20": p20,
        "propose_us_p50": p50,
        "propose_us_p80": p80,
        "nodes_mean": statistics.mean(nodes),
        "learn_tokens_per_s": tokens / learn_s,
        "bytes_per_token": index.nbytes / tokens,
    }


def figures(recording: Recording, nodes: int) -> dict[str, float]:
    """Tokens per pass of one budget under every order and split."""
    half = len(recording.samples) // 2
    first = recording._replace(samples=recording.samples[:half])
    second = recording._replace(samples=recording.samples[half:])
    # Scopes follow the question's number, so both halves must ask the same ones.
    assert first.questions == second.questions

    def run(part: Recording, before: Recording | None = None, learning: bool = True) -> float:
        drafter = CorpusDrafter()
        if before is not None:
            replay(before, drafter, nodes)
        return replay(part, drafter, nodes, learning=learning).tokens_per_pass

    orders = [recording._replace(samples=shuffled(recording.samples, seed)) for seed in range(5)]
    mixed = [run(order) for order in orders]
    return {
        "file": run(recording),
        "shuffled": statistics.mean(mixed),
        "shuffled_lowest": min(mixed),
        "first": run(first),
        "second": run(second),
        "continued": run(second, before=first),
        "frozen": run(second, before=first, learning=False),
        "evidence": replay(recording, CorpusDrafter(), nodes, evidence=True).tokens_per_pass,
    }


def show(rows: list[dict[str, str | float]], say: Callable[[str], None]) -> None:
    titles = f"{'tree p50':>12} {'p80':>7} {'limit':>6}  {'learn/s':>9} {'limit':>6}  B/token"
    say(f"{'input':14} {'tokens':>9} {titles}")
    for row in rows:
        p50, rate = float(row["propose_us_p50"]), float(row["learn_tokens_per_s"])
        say(
            f"{row['case']:14} {row['tokens']:>9,} {p50:>9.1f} us {row['propose_us_p80']:>7.1f} "
            f"{p50 / LIMITS['propose_us_p50']:>5.2f}x  {rate / 1e6:>7.2f} M "
            f"{rate / LIMITS['learn_tokens_per_s']:>5.2f}x  {row['bytes_per_token']:>6.1f}"
        )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--tokens", type=int, default=1_000_000)
    arguments.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="the index lives on the CPU"
    )
    arguments.add_argument("--no-figures", action="store_true", help="speed and memory only")
    arguments.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = arguments.parse_args()
    if native.cpu is None:
        raise SystemExit(f"the native index was not built: {native.missing['cpu']}")
    say = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    rows = []
    for name, answers in inputs(args.tokens).items():
        rows.append(measure(name, answers))
    show(rows, say)
    replayed: list[dict[str, str | float]] = []
    recording = None if args.no_figures else real_recording()
    if recording is None and not args.no_figures:
        say("\nno recorded answers found: figures left out")
    for nodes in (8, 16, 32, 64) if recording is not None else ():
        found = figures(recording, nodes)
        replayed.append({"case": f"{nodes} nodes", **found})
        say(
            f"\n{nodes} nodes, tokens per pass (replayed): "
            + ", ".join(f"{k} {v:.3f}" for k, v in found.items())
        )
    if args.json:
        print(json.dumps({"limits": LIMITS, "speed": rows, "figures": replayed}))


if __name__ == "__main__":
    main()
