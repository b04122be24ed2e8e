"""What lossy acceptance buys and costs: tokens per pass, agreement, facts still right.

    python benchmarks/bench_acceptance.py --event-adapter DIR --head-calibration DIR [--clips 16]

Clips are of held-out drives of the driving world that no calibration has seen; the target is the shipped
Video-LLaVA, drafters are the shipped EventGPT and the shipped head. Both directories hold what
``specfuse align calibrate`` wrote. Every question goes through every rule; the exact rule's answers are what
the others are compared with.

    tokens_per_pass   emitted tokens per pass of the target, the prefill included
    same_answers      share of answers that equal the lossless one, token by token
    token_agreement   1 - edit distance of the two answers in tokens / the longer one's length, mean
    overruled         share of tokens that the target did not choose where they stand
    facts_right       share of factual questions whose answer is right (specfuse.data.world.score)
    facts_changed     share of factual questions whose answer is another one than without loss
    trusted           of drafts with an estimate within the bound: estimated and measured agreement
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from environment import COLUMNS, environment

from specfuse.acceptance import (
    AcceptanceRule,
    CosineAcceptance,
    SemanticAcceptance,
    TokenEmbedding,
    TypicalAcceptance,
)
from specfuse.acceptance.agreement import token_agreement
from specfuse.calibrate import LONGEST, Asked, held_out_clips, world_questions
from specfuse.cli.train import default_cache
from specfuse.data import miniature
from specfuse.data.world import score
from specfuse.data.world.score import read_answer
from specfuse.drafters import Drafter, HeadDrafter
from specfuse.drafters.event import EventDrafter
from specfuse.generate import SpeculativeGenerator
from specfuse.models.checkpoint import load_eventgpt

BOUNDS = (0.1, 0.3, 0.5)
FIGURES = (
    *("tokens_per_pass", "same_answers", "token_agreement", "overruled", "facts_right", "facts_changed"),
    *("trusted", "estimated", "measured"),
)


def rules(model: Any, processor: Any, calibration: Path) -> dict[str, AcceptanceRule | str]:
    """The rules of the table; the exact one first."""
    table: dict[str, AcceptanceRule | str] = {"exact": "exact"}
    for epsilon in (0.09, 0.3):
        table[f"typical, epsilon {epsilon}"] = TypicalAcceptance(epsilon, epsilon**0.5)
    for bound in BOUNDS:
        table[f"cosine, bound {bound}"] = CosineAcceptance.from_pretrained(
            calibration, max_disagreement=bound
        )
    embed = TokenEmbedding(model, processor.tokenizer)
    for threshold in (0.95, 0.85):
        rule = SemanticAcceptance(processor.tokenizer, embed, threshold=threshold)
        table[f"semantic, token embeddings, {threshold}"] = rule
    return table


def measure(
    model: Any, processor: Any, drafter: Drafter, rule: AcceptanceRule | str, asked: list[Asked], nodes: int
) -> tuple[list[list[int]], dict[str, Any]]:
    """Every answer, and the sums of the run."""
    generator = SpeculativeGenerator(model, drafter, max_nodes=nodes, accept=rule)
    answers, sums = [], dict.fromkeys(("passes", "tokens", "overruled", "drafts", "estimated", "agreed"), 0.0)
    for each in asked:
        output = generator.generate(**each.inputs, max_new_tokens=LONGEST, do_sample=False)
        length = each.inputs["input_ids"].shape[1]
        answers.append(output[0, length:].tolist())  # type: ignore[index]
        stats, label = generator.last_stats, generator.last_acceptance
        assert stats is not None
        sums["passes"] += stats.passes
        sums["tokens"] += stats.tokens
        sums["overruled"] += label.get("overruled", 0)
        trusted = label.get("trusted", {"drafts": 0})
        if trusted["drafts"]:
            sums["drafts"] += trusted["drafts"]
            sums["estimated"] += trusted["estimated_agreement"] * trusted["drafts"]
            sums["agreed"] += trusted["measured_agreement"] * trusted["drafts"]
    return answers, sums


def figures(
    said: list[list[int]], lossless: list[list[int]], sums: dict[str, Any], asked: list[Asked], tokenizer: Any
) -> dict[str, Any]:
    """The columns of one row."""
    texts, exact = ([tokenizer.decode(a, skip_special_tokens=True) for a in x] for x in (said, lossless))
    facts = [i for i, each in enumerate(asked) if each.question.factual]
    alike = [token_agreement(a, b) for a, b in zip(said, lossless, strict=True)]

    def read(i: int, of: list[str]) -> str | None:
        return read_answer(asked[i].question.kind, of[i])

    drafts = sums["drafts"]
    return {
        "questions": len(asked),
        "facts": len(facts),
        "tokens_per_pass": sums["tokens"] / sums["passes"],
        "same_answers": sum(a == b for a, b in zip(said, lossless, strict=True)) / len(asked),
        "token_agreement": sum(alike) / len(alike),
        "overruled": sums["overruled"] / sums["tokens"],
        "facts_right": sum(score(asked[i].question, texts[i]) for i in facts) / max(len(facts), 1),
        "facts_changed": sum(read(i, texts) != read(i, exact) for i in facts) / max(len(facts), 1),
        "trusted": drafts or None,
        "estimated": sums["estimated"] / drafts if drafts else None,
        "measured": sums["agreed"] / drafts if drafts else None,
    }


def table(options: argparse.Namespace) -> list[dict[str, Any]]:
    model, processor = miniature.load_target()
    event_gpt = load_eventgpt(miniature.directory("tiny-eventgpt"), dtype=torch.float32)
    drafters: dict[str, tuple[Drafter, Path | None]] = {
        "tiny-eventgpt": (EventDrafter(*event_gpt, processor), options.event_adapter),
        "tiny-head": (
            HeadDrafter.from_pretrained(miniature.directory("tiny-head"), model),
            options.head_calibration,
        ),
    }
    clips = held_out_clips("measure", options.clips)
    found = []
    for name, (drafter, calibration) in drafters.items():
        if calibration is None:
            continue
        asked = list(
            world_questions(clips, options.questions, processor, drafter, default_cache(), options.seed)
        )
        lossless: list[list[int]] = []
        for rule_name, rule in rules(model, processor, calibration).items():
            answers, sums = measure(model, processor, drafter, rule, asked, options.nodes)
            lossless = lossless or answers
            row = {"drafter": name, "rule": rule_name}
            row |= figures(answers, lossless, sums, asked, processor.tokenizer)
            found.append(row)
            told = {key: "" if row[key] is None else f"{row[key]:.3f}" for key in FIGURES}
            print(f"{name:14} {rule_name:34}", *told.values(), flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--event-adapter", type=Path, help="adapter and calibration.json for tiny-eventgpt")
    parser.add_argument("--head-calibration", type=Path, help="calibration.json for tiny-head")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if options.event_adapter is None and options.head_calibration is None:
        parser.error("give --event-adapter DIR or --head-calibration DIR, as specfuse align calibrate wrote")
    print(f"{'drafter':14} {'rule':34}", *FIGURES)
    rows = table(options)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "acceptance.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *COLUMNS])
        writer.writeheader()
        about = environment()
        for row in rows:
            rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded | about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
