"""What a step costs besides the model, the drafter and the ops: the loop's bookkeeping, part by part.

    python benchmarks/bench_step.py [--rounds 5] [--tokens 256] [--layers 2] [--clock processor] [--json]

The target is a stub: it writes prepared keys and values through the loop's own cache and returns prepared
logits (the token after t is t + 1), so what is accepted is known and the rest of a step is what is measured.
About a quarter of a tree lies on the accepted path, more in one row and less in another, so that the rows of
a batch stand at different lengths. Functions are timed with what they call taken out: the parts add up to
the step. The timer costs about 0.5 us a call and is part of the figures.

"model", "drafter" and the ops are what a step is for. Everything else is bookkeeping: guard (is the tree
sound?), mask (positions and attention mask), call (arguments of the forward), cache (writing keys and
values, per layer), verify (arguments of the op), read (the result as lists), emit (answers, stopping
criteria, statistics), commit (arguments of compact_kv), loop (all that is left). A CPU figure: on a GPU the
same host code runs, and transfers come on top.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from environment import cpu_name
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import specfuse

VOCAB = 256
CLOCKS = {"wall": time.perf_counter, "processor": time.thread_time}
# Where each part is spent: a function, and the part that its own time counts for.
WATCHED = {
    "specfuse.generate:SpeculativeGenerator._propose": "guard",
    "specfuse.passes.tree_forward:TreeForward.forward_tree": "mask",
    "specfuse.passes.tree_forward:TreeForward._call": "call",
    "specfuse.passes.kv_cache:TreeCacheLayer.update": "cache",
    "specfuse.run:verify": "verify",
    "specfuse.verify:_verify_tree": "op verify_tree",
    "specfuse.run:GenerationRun.read": "read",
    "specfuse.run:GenerationRun.emit": "emit",
    "specfuse.passes.tree_forward:TreeForward.commit": "commit",
    "specfuse.passes.kv_cache:compact_kv": "op compact_kv",
}
PARTS = ("guard", "mask", "call", "cache", "verify", "read", "emit", "commit", "loop", "bookkeeping")
USEFUL = ("model", "drafter", "op verify_tree", "op compact_kv")
PARTS += (*USEFUL, "tokens")


class Watch:
    """Time spent in functions, each without what the watched functions below it spent."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.inner = [0.0]
        self.started = 0.0
        self.steps = 0
        self.undo: list[Callable[[], None]] = []

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Replaces ``owner.name`` by the same function with a stop-watch."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            begin = self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                taken = self.clock() - begin
                self.spent[part] += taken - self.inner.pop()
                self.inner[-1] += taken

        setattr(owner, name, timed)
        self.undo.append(functools.partial(setattr, owner, name, function))

    def after(self, owner: Any, name: str, then: Callable[[], object]) -> None:
        """Has ``then`` called after every call of ``owner.name``."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def followed(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            then()
            return result

        setattr(owner, name, followed)
        self.undo.append(functools.partial(setattr, owner, name, function))

    def start(self) -> None:
        """Forgets what was spent so far."""
        self.spent.clear()
        self.steps = 0
        self.inner[:] = [0.0] * len(self.inner)
        self.started = self.clock()

    def step(self) -> None:
        """Counts one."""
        self.steps += 1

    def stop(self) -> dict[str, float]:
        """Seconds of each part since the start; "loop" is what no watched function spent."""
        elapsed = self.clock() - self.started
        return {**self.spent, "loop": elapsed - sum(self.spent.values())}

    def close(self) -> None:
        """Puts every function back."""
        while self.undo:
            self.undo.pop()()


class PreparedTarget(LlamaForCausalLM):
    """Writes prepared keys and values, and predicts t + 1 behind every token t."""

    def __init__(self, layers: int):
        super().__init__(
            LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=layers,
                num_attention_heads=2,
                bos_token_id=None,
                eos_token_id=VOCAB - 1,
                pad_token_id=0,
            )
        )
        self.rows = torch.zeros(VOCAB, VOCAB)
        # The end-of-sequence id is looked for and never comes.
        following = (torch.arange(VOCAB) + 1) % (VOCAB - 1)
        self.rows[torch.arange(VOCAB), following] = 1.0
        self.written: dict[tuple[int, int], Tensor] = {}

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        assert input_ids is not None
        cache = past_key_values if cache is None else cache
        batch, count = input_ids.shape
        states = self.written.get((batch, count))
        if states is None:
            states = self.written[batch, count] = torch.zeros(batch, 2, count, 16)
        for layer in range(self.config.num_hidden_layers):
            cache.update(states, states, layer)
        return CausalLMOutputWithPast(logits=self.rows[input_ids])


class QuarterRight(specfuse.Drafter):
    """Trees of ``nodes`` nodes: a right path of a length that differs by row, and wrong branches off it."""

    def __init__(self, nodes: int):
        right = max(1, nodes // 2)
        parents = [-1, *range(right), *range(nodes - 1 - right)][:nodes]
        depths = [0]
        for node in range(1, nodes):
            depths.append(depths[parents[node]] + 1)
        self.parents = torch.tensor(parents, dtype=torch.int32)
        self.right = right
        # Wrong tokens lie 100 ahead; the variants break the path behind 0, 1, ... right tokens.
        onward = [depth if node <= right else depth + 100 for node, depth in enumerate(depths)]
        self.variants = torch.tensor(
            [
                [value + 50 * (0 < node <= right and value > kept) for node, value in enumerate(onward)]
                for kept in range(right + 1)
            ]
        )
        self.calls = 0

    def propose(self, state: Any, max_nodes: int) -> specfuse.TokenTree:
        batch = state.batch_size
        self.calls += 1
        chosen = [(5 * row + 3 * self.calls) % (self.right + 1) for row in range(batch)]
        roots = torch.tensor([state.root(row) for row in range(batch)])
        tokens = (roots[:, None] + self.variants[chosen]) % (VOCAB - 1)
        parents = self.parents.expand(batch, -1).contiguous()
        counts = torch.full((batch,), len(self.parents), dtype=torch.int32)
        return specfuse.TokenTree(tokens, parents, counts)


def step_us(batch: int, nodes: int, tokens: int, layers: int, clock: str) -> dict[str, float]:
    """Microseconds per step of each part and of the bookkeeping; tokens per step and row."""
    model = PreparedTarget(layers).eval()
    drafter = QuarterRight(nodes) if nodes > 1 else None
    generator = specfuse.SpeculativeGenerator(model, drafter, max_nodes=max(nodes - 1, 1))
    # No pad id among them: transformers would take it for padding.
    prompts = torch.arange(batch * 8).reshape(batch, 8) % 200 + 1
    watch, totals = Watch(CLOCKS[clock]), {}
    try:
        for path, part in WATCHED.items():
            watch.watch(*_owner(path), part)
        watch.watch(model, "forward", "model")
        if drafter is not None:
            watch.watch(drafter, "propose", "drafter")
        # The loop begins behind the prompt's pass and ends where the drafter learns the answer.
        watch.after(*_owner("specfuse.run:GenerationRun.prefill"), watch.start)
        watch.after(*_owner("specfuse.run:GenerationRun.emit"), watch.step)
        watch.after(specfuse.SpeculativeGenerator, "_learn", lambda: totals.update(watch.stop()))
        generator.generate(prompts, max_new_tokens=tokens, do_sample=False)
    finally:
        watch.close()
    stats = generator.last_stats
    assert stats is not None
    steps = max(watch.steps, 1)
    parts = {part: 1e6 * seconds / steps for part, seconds in totals.items()}
    bookkeeping = sum(us for part, us in parts.items() if part not in USEFUL)
    return {**parts, "bookkeeping": bookkeeping, "tokens": stats.tokens_per_pass}


def _owner(path: str) -> tuple[Any, str]:
    module, names = path.split(":")
    *objects, name = names.split(".")
    return functools.reduce(getattr, objects, importlib.import_module(module)), name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="the median is shown (default 5)")
    parser.add_argument("--tokens", type=int, default=256, help="emitted per row (default 256)")
    parser.add_argument("--layers", type=int, default=2, help="of the stub (default 2)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: of a busy machine")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    cases = [(batch, nodes) for batch in (1, 16) for nodes in (1, 16, 32)]
    samples: dict[tuple[int, int], list[dict[str, float]]] = defaultdict(list)
    for _ in range(args.rounds + 1):
        for case in cases:
            samples[case].append(step_us(*case, args.tokens, args.layers, args.clock))
    rows = []
    for (batch, nodes), runs in samples.items():
        # The first round finds everything cold.
        median = {part: statistics.median(run.get(part, 0.0) for run in runs[1:]) for part in PARTS}
        rows.append({"case": f"B{batch}-N{nodes}", **{part: round(us, 1) for part, us in median.items()}})
    if args.json:
        print(json.dumps({"clock": args.clock, "layers": args.layers, "tokens": args.tokens, "steps": rows}))
        return
    print(f"us per step on {cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':16}" + "".join(f"{row['case']:>9}" for row in rows))
    for part in PARTS:
        print(f"{part:16}" + "".join(f"{row[part]:9}" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
