"""Many requests: streams and batches of specfuse against batches of model.generate.

    python benchmarks/bench_batch.py [--requests 64] [--batch 8 32] [--rounds 3] [--only NAME]
                                     [--csv FILE] [--quick]

Two models. "miniature": questions about held-out clips, on the vision cache for everybody: batching is what
is compared. "60m": a LLaMA of 60 million random weights and text prompts of 16 to 64 tokens, whose answers
have 8 to 128 tokens, most of them short, as answers have; its drafts are simulated, right with probability
0.8, four deep, and labelled so. Every system answers all requests, batches in their order of arrival, left
padded; a batch runs until its longest answer ends. Answers are compared with those of model.generate before
anything is timed. Rounds are interleaved, another system first each time.

    tokens/s       of all answers, median over rounds
    over generate  median over rounds of model.generate's time over this one's
    row passes     rows that the target's passes carried, over those that plain decoding one by one would

"one video": questions about one clip by VideoSession.ask_many, asked one after the other, or without the
shared prefix; KV bytes are those of the rows' cache when largest.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from end_to_end.simulated import SimulatedDrafter
from environment import COLUMNS, environment
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

import specfuse
import specfuse.session as session_module
from specfuse.data import miniature
from specfuse.demo import LONGEST, choose
from specfuse.session import FIRST_TURN, VideoSession
from specfuse.stream import AnswerStream
from specfuse.vision.cache import patch

Answers = list[list[int]]
FIGURES = ("tokens_per_s", "over_generate", "row_passes", "kv_bytes")
ROW = (*COLUMNS, "model", "batch", "requests", "system", *FIGURES, "threads")
ACCEPTANCE, DEPTH = 0.8, 4


class Lengths(StoppingCriteria):
    """Ends row b of a batch after ``lengths[b]`` tokens: random weights have no end of their own."""

    def __init__(self, prompt: int, lengths: Sequence[int]):
        self.ends = torch.tensor([prompt + length for length in lengths])

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        # specfuse asks about one row at a time.
        ends = self.ends if len(self.ends) == len(input_ids) else self.ends[:1]
        return input_ids.shape[1] >= ends.to(input_ids.device)


class Request(NamedTuple):
    """One prompt ``[1, P]`` with its pixels, and how long its answer may be."""

    inputs: dict[str, Tensor]
    length: int
    answer: list[int]


class System(NamedTuple):
    """Answers all requests with a drafter that ``make`` made, new each time and not timed."""

    name: str
    make: Callable[[], Any]
    run: Callable[[Any], Answers]


class Bench:
    """One model with its requests; ``rows`` counts those of its passes."""

    def __init__(
        self, model: Any, requests: list[Request], drafters: dict[str, Callable[[], Any]], ends: bool
    ):
        self.model, self.requests, self.drafters, self.ends = model, requests, drafters, ends
        self.rows = 0
        model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        shown = kwargs.get("inputs_embeds")
        self.rows += len(kwargs["input_ids"] if shown is None else shown)

    def systems(self, batch: int) -> list[System]:
        """model.generate first, then specfuse's."""
        found = [System("model.generate", lambda: None, lambda _: self.batched(self.model.generate, batch))]
        for name, make in self.drafters.items():
            for kind, run in (("specfuse.generate", self.by_generator), ("specfuse stream", self.streamed)):
                found.append(System(f"{kind}, {name}", make, lambda drafter, r=run: r(drafter, batch)))
        return found

    def by_generator(self, drafter: Any, batch: int) -> Answers:
        """Batches of specfuse.generate."""

        def generate(**arguments: Any) -> Tensor:
            return specfuse.generate(self.model, drafter, max_nodes=16, **arguments)

        return self.batched(generate, batch)

    def batched(self, generate: Callable[..., Tensor], batch: int) -> Answers:
        """Batches in order of arrival, left padded."""
        answers: Answers = []
        for first in range(0, len(self.requests), batch):
            group = self.requests[first : first + batch]
            inputs, longest = left_padded([r.inputs for r in group]), max(r.length for r in group)
            prompt = inputs["input_ids"].shape[1]
            criteria = (
                {"stopping_criteria": [Lengths(prompt, [r.length for r in group])]} if self.ends else {}
            )
            if self.ends and generate is not self.model.generate:
                criteria = {"stopping_criteria": [RowLengths(inputs["input_ids"], [r.length for r in group])]}
            out = generate(**inputs, max_new_tokens=longest, do_sample=False, **criteria)
            answers += [
                row[:length]
                for row, length in zip(out[:, prompt:].tolist(), self._lengths(group), strict=True)
            ]
        return answers

    def _lengths(self, group: list[Request]) -> list[int]:
        return [len(request.answer) or request.length for request in group]

    def streamed(self, drafter: Any, batch: int) -> Answers:
        """All requests through one stream."""
        generator = specfuse.SpeculativeGenerator(self.model, drafter, max_nodes=16)
        requests = ({**r.inputs, "max_new_tokens": r.length, "do_sample": False} for r in self.requests)
        found: dict[int, list[int]] = {}
        for answer in generator.stream(requests, batch_size=batch):
            if answer.error is not None:
                raise answer.error
            found[answer.id] = answer.tokens
        return [found[i] for i in range(len(self.requests))]


class RowLengths(StoppingCriteria):
    """As Lengths, where rows are shown one at a time: told apart by their prompts."""

    def __init__(self, prompts: Tensor, lengths: Sequence[int]):
        self.ends = {tuple(row): len(row) + n for row, n in zip(prompts.tolist(), lengths, strict=True)}
        self.width = prompts.shape[1]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = [len(row) >= self.ends[tuple(row[: self.width])] for row in input_ids.tolist()]
        return torch.tensor(done, device=input_ids.device)


class ByRow(specfuse.Drafter):
    """Simulated drafts for many rows: each its own line of mostly right tokens."""

    def __init__(self, requests: list[Request]):
        self.lines: dict[tuple[int, ...], SimulatedDrafter] = {}
        draw = random.Random(0)
        for request in requests:
            wrong = [t if draw.random() < ACCEPTANCE else (t + 1) % 100 + 3 for t in request.answer]
            self.lines[tuple(request.inputs["input_ids"][0].tolist())] = SimulatedDrafter(wrong)

    def propose(self, state: specfuse.DraftState, max_nodes: int) -> specfuse.TokenTree:
        chains = []
        for prompt, answer, left in zip(state.prompts, state.answers, state.remaining, strict=True):
            line = self.lines[tuple(prompt)].line
            chains.append(line[len(answer) : len(answer) + min(DEPTH, left - 1)])
        return specfuse.TokenTree.from_chains([state.root(row) for row in range(len(chains))], chains)


def left_padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Prompts ``[1, P]`` as one batch, pixels one below the other."""
    width = max(row["input_ids"].shape[1] for row in rows)
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if name in ("input_ids", "attention_mask"):
            parts = [torch.nn.functional.pad(part, (width - part.shape[1], 0)) for part in parts]
        batch[name] = torch.cat(parts)
    return batch


def sixty_million(count: int, device: str) -> Bench:
    """A random LLaMA of 60 million parameters that never ends by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        eos_token_id=31999,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config).eval().to(device)
    model.lm_head.weight.data[31999] = 0
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 31999, 0
    draw = random.Random(1)
    requests = []
    for _ in range(count):
        prompt = [draw.randrange(3, 31000) for _ in range(draw.randint(16, 64))]
        ids = torch.tensor([prompt], device=device)
        length = min(8 + int(draw.expovariate(1 / 30)), 128)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        out = model.generate(**inputs, max_new_tokens=length, do_sample=False)
        requests.append(Request(inputs, length, out[0, ids.shape[1] :].tolist()))
    simulated = f"simulated drafts ({ACCEPTANCE:.0%} right, {DEPTH} deep)"
    drafters = {"plain": lambda: None, simulated: lambda: ByRow(requests)}
    return Bench(model, requests, drafters, ends=True)


def small_world(count: int, device: str) -> tuple[Bench, list[Any]]:
    """The miniature with its vision cache; and the clips."""
    model, processor = miniature.load_target()
    model.to(device)
    patch(model)
    clips = choose(max(count // 8, 1), 8, seed=0)
    requests = []
    for asked in clips:
        for question in asked.questions:
            text = FIRST_TURN.format(question=question.text)
            inputs = dict(processor(text=text, videos=asked.frames, return_tensors="pt").to(device))
            out = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
            requests.append(Request(inputs, LONGEST, out[0, inputs["input_ids"].shape[1] :].tolist()))
    drafters = {"plain": lambda: None, "lookup": lambda: "lookup", "corpus": miniature.load_corpus}
    return Bench(model, requests[:count], drafters, ends=False), [*clips, (model, processor)]


def measure(bench: Bench, systems: list[System], rounds: int) -> dict[str, dict[str, float]]:
    """Figures by system, once all have been found to give model.generate's answers."""
    expected = [request.answer for request in bench.requests]
    rows = {}
    for system in systems:
        bench.rows = 0
        answers = system.run(system.make())
        rows[system.name] = bench.rows
        if wrong := [i for i, pair in enumerate(zip(answers, expected, strict=True)) if pair[0] != pair[1]]:
            raise SystemExit(f"{system.name} gave other tokens than model.generate for requests {wrong}")
    seconds: dict[str, list[float]] = {system.name: [] for system in systems}
    for turn in range(rounds):
        for place in range(len(systems)):
            system = systems[(turn + place) % len(systems)]
            drafter = system.make()
            start = time.perf_counter()
            system.run(drafter)
            seconds[system.name].append(time.perf_counter() - start)
    tokens, base = sum(map(len, expected)), seconds[systems[0].name]
    return {
        name: {
            "tokens_per_s": tokens / statistics.median(taken),
            "over_generate": statistics.median(b / s for b, s in zip(base, taken, strict=True)),
            "row_passes": rows[name] / tokens,
        }
        for name, taken in seconds.items()
    }


def one_video(parts: list[Any], count: int, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Questions about one clip: with a shared prefix, with a copy in every row, one after the other."""
    asked, (model, processor) = parts[0], parts[-1]
    texts = list(itertools.islice(itertools.cycle(question.text for question in asked.questions), count))
    session = VideoSession(model, processor, asked.frames, None)
    sizes: list[int] = []
    shareable, step = session_module._shareable, AnswerStream._step

    def watched(self: AnswerStream) -> Iterator[Any]:
        sizes.append(self.pool.kv_bytes)
        return step(self)

    def many(shares: bool) -> list[str]:
        session_module._shareable = shareable if shares else lambda model, kv: None  # type: ignore[assignment]
        AnswerStream._step = watched  # type: ignore[method-assign]
        try:
            return session.ask_many(texts, batch_size=batch, max_new_tokens=LONGEST)
        finally:
            session_module._shareable, AnswerStream._step = shareable, step  # type: ignore[method-assign]

    systems = {
        "one after the other": lambda: [session.fork().ask(t, max_new_tokens=LONGEST) for t in texts],
        "ask_many, a copy in every row": lambda: many(False),
        "ask_many": lambda: many(True),
    }
    found: dict[str, dict[str, float]] = {}
    expected: list[str] = []
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name, answer in systems.items():
            sizes.clear()
            start = time.perf_counter()
            answers = answer()
            seconds[name].append(time.perf_counter() - start)
            expected = expected or answers
            if answers != expected:
                raise SystemExit(f"{name} gave other answers")
            found[name] = {"kv_bytes": max(sizes, default=0)}
        if turn == 0:
            seconds = {name: [] for name in systems}
    tokens = sum(len(answer.tokens) for answer in expected)  # type: ignore[attr-defined]
    base = seconds["one after the other"]
    for name, taken in seconds.items():
        ratio = statistics.median(b / s for b, s in zip(base, taken, strict=True))
        found[name] |= {"tokens_per_s": tokens / statistics.median(taken), "over_generate": ratio}
    return found


def show(
    model: str, batch: int, requests: int, found: dict[str, dict[str, float]], path: Path | None
) -> None:
    print(f"\n{model}, batch {batch}, {requests} requests\n")
    print("| system | tokens/s | over the first row | row passes a token | KV bytes |\n|---|---|---|---|---|")
    for name, row in found.items():
        passes = f"{row['row_passes']:.2f}" if "row_passes" in row else ""
        held = f"{row['kv_bytes']:,}" if row.get("kv_bytes") else ""
        print(f"| {name} | {row['tokens_per_s']:.0f} | {row['over_generate']:.2f}x | {passes} | {held} |")
    if path is None:
        return
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, ROW)
        if new:
            writer.writeheader()
        fixed = {**environment(), "model": model, "batch": batch, "requests": requests}
        fixed["threads"] = str(torch.get_num_threads())
        for name, row in found.items():
            rounded = {k: str(v) if isinstance(v, int) else f"{v:.5g}" for k, v in row.items()}
            writer.writerow({**fixed, "system": name, **rounded})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="miniature, 60m or one video")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--quick", action="store_true", help="8 requests, batch 4, one round: does it run?")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    device = options.device
    if options.quick:
        options.requests, options.batch, options.rounds = 8, [4], 1
    small = small_world(options.requests, device) if options.only in ("", "miniature", "one video") else None
    benches = {"miniature": small and small[0]}
    benches["60m"] = sixty_million(options.requests, device) if options.only in ("", "60m") else None
    for name, bench in benches.items():
        for batch in options.batch if bench is not None and options.only in ("", name) else []:
            assert bench is not None
            found = measure(bench, bench.systems(batch), options.rounds)
            show(name, batch, len(bench.requests), found, options.csv)
            sys.stdout.flush()
    if small is not None and options.only in ("", "one video"):
        for batch in options.batch:
            found = one_video(small[1], options.requests, batch, options.rounds)
            show("one video", batch, options.requests, found, options.csv)


if __name__ == "__main__":
    main()
