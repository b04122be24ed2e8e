"""What drafting may cost where nothing can be predicted: ``max_nodes="auto"`` against plain decoding.

    python benchmarks/bench_guard.py [--rounds 12] [--batch 1 4] [--hidden 512 --layers 8] [--json]

A random LLaMA decodes the same prompts plain (drafter=None) and with a drafter that is always sure and always
wrong, 64 nodes wide. Every round asks a new prompt of both, in turns; ratios are plain time over ours, so 1
is "costs nothing". `first` forgets before each answer what passes cost and what the drafter was worth: the
first call of a process. `later` goes on with what the rounds before have found. Tokens are compared. Time is
the process's own (all threads), which neighbours on the machine disturb less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from environment import cpu_name
from transformers import LlamaConfig, LlamaForCausalLM

import specfuse
from specfuse import tree_size

VOCAB = 4096


class SureAndWrong(specfuse.Drafter):
    """Chains and branches of one token that never comes, each said to be nearly certain."""

    def __init__(self, never: int, width: int = 64):
        parents = [-1, *(node // 2 for node in range(width))]
        depths = [0]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
        self.never, self.parents = never, parents
        self.probs = [0.95**depth for depth in depths]

    def propose(self, state: Any, max_nodes: int) -> specfuse.TokenTree:
        width = min(len(self.parents), max_nodes + 1)
        # Siblings must differ: the even nodes hold one such token, the odd ones the other.
        tokens = [
            [state.root(row), *(self.never + node % 2 for node in range(1, width))]
            for row in range(state.batch_size)
        ]
        rows = state.batch_size
        return specfuse.TokenTree.from_parents(
            tokens, [self.parents[:width]] * rows, [self.probs[:width]] * rows
        )


def random_model(hidden: int, layers: int) -> LlamaForCausalLM:
    """Wide enough weights that answers vary; the last two tokens are never chosen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=int(2.6875 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=8,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
        model.lm_head.weight[-2:] = 0
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def measure(model: LlamaForCausalLM, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Ratios of plain time to ours, and how many passes were drafted."""
    ratios: dict[str, list[float]] = {"first": [], "later": []}
    drafted: dict[str, list[int]] = {"first": [], "later": []}
    kept = SureAndWrong(VOCAB - 2)
    draw = torch.Generator().manual_seed(batch)
    kept_costs: Any = None
    for turn in range(rounds + 1):
        prompt = torch.randint(1, VOCAB - 2, (batch, 64), generator=draw)
        options = {"input_ids": prompt, "max_new_tokens": tokens, "do_sample": False}
        for name in ratios:
            tree_size._TIMES.clear(), tree_size._COSTS.clear()
            drafter = SureAndWrong(VOCAB - 2) if name == "first" else kept
            ours = specfuse.SpeculativeGenerator(model, drafter, max_nodes="auto")
            plain = specfuse.SpeculativeGenerator(model, None)
            if name == "later" and kept_costs is not None:
                tree_size._TIMES.update(kept_costs[0]), tree_size._COSTS.update(kept_costs[1])
            order = (plain, ours) if turn % 2 else (ours, plain)
            spent, answers = {}, []
            for system in order:
                begin = time.process_time()
                answers.append(system.generate(**options))
                spent[system] = time.process_time() - begin
            assert torch.equal(*answers), "the answers differ"
            if name == "later":
                kept_costs = (dict(tree_size._TIMES), dict(tree_size._COSTS))
            if turn:
                ratios[name].append(spent[plain] / spent[ours])
                assert ours.last_stats is not None
                drafted[name].append(ours.last_stats.drafted)
    return {
        name: {
            "p20": round(statistics.quantiles(values, n=5)[0], 3),
            "p50": round(statistics.median(values), 3),
            "p80": round(statistics.quantiles(values, n=5)[3], 3),
            "drafted_nodes": statistics.mean(drafted[name]),
        }
        for name, values in ratios.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    model = random_model(args.hidden, args.layers)
    rows = [{"case": f"B{batch}", **measure(model, batch, args.tokens, args.rounds)} for batch in args.batch]
    if args.json:
        print(json.dumps({"tokens": args.tokens, "hidden": args.hidden, "layers": args.layers, "rows": rows}))
        return
    print(f"plain / auto, {args.tokens} tokens, {args.layers} x {args.hidden}, {cpu_name()}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
