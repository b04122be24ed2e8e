"""How often greedy tree decoding in bf16 gives other tokens than model.generate, and why.

    python benchmarks/bf16_agreement.py [--models 40] [--new-tokens 50] [--json]

In bf16 a pass over many tokens and a pass over one round differently, so where two logits are nearly equal
the answers may part. Control: one plain pass of the model over the finished answer, no specfuse in it,
compared with the tokens model.generate chose step by step. For every answer that parts, the top-2 gap of the
logits at that step (model.generate's own) is given in bf16 steps at that magnitude.

Random LLaMA models, a drafter that knows the answer among wrong branches (so that trees are accepted), batch
1. Random models have flatter logits than trained ones: expect fewer cases there, from the same cause.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import specfuse
from specfuse.tree import TokenTree


class KnowingDrafter(specfuse.Drafter):
    """Drafts the known answer with wrong siblings beside it."""

    def __init__(self, answer: Sequence[int], vocab: int, seed: int):
        self.answer, self.vocab, self.random = list(answer), vocab, random.Random(seed)

    def propose(self, state: specfuse.DraftState, max_nodes: int) -> TokenTree:
        done = len(state.answers[0])
        path = self.answer[done : done + max_nodes // 2]
        wrong = [[*path[:i], self.random.randrange(self.vocab)] for i in range(len(path))]
        return TokenTree.from_sequences([state.root(0)], [[path, *wrong]], max_nodes)


def random_llama(seed: int) -> LlamaForCausalLM:
    """A random LLaMA in bf16 whose answers are not one token repeated."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
    return model.to(torch.bfloat16)


def compare(seed: int, new_tokens: int) -> dict[str, Any]:
    """Whether and where the answers part, the top-2 gap there, and the verdict of one plain pass over it."""
    model = random_llama(seed)
    prompt = torch.randint(3, 4096, (1, 12), generator=torch.Generator().manual_seed(seed))
    options = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": new_tokens,
        "do_sample": False,
    }
    plain = model.generate(**options, return_dict_in_generate=True, output_logits=True)
    expected = plain.sequences[0, 12:].tolist()
    got = specfuse.generate(model, KnowingDrafter(expected, 4096, seed), **options)[0, 12:].tolist()
    with torch.no_grad():
        at_once = model(plain.sequences).logits[0, 11:-1].argmax(-1).tolist()
    found: dict[str, Any] = {"seed": seed, "control_parts": at_once != expected, "parts": got != expected}
    if got == expected:
        return found
    step = next(i for i in range(new_tokens) if got[i] != expected[i])
    first, second = plain.logits[step][0].float().topk(2).values.tolist()
    ulp = 2.0 ** (math.floor(math.log2(max(abs(first), 1e-30))) - 7)  # bf16 has 8 bits of significand
    return {**found, "step": step, "top2_gap": first - second, "gap_in_bf16_steps": (first - second) / ulp}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compared = [compare(seed, arguments.new_tokens) for seed in range(arguments.models)]
    parted = [p for p in compared if p["parts"]]
    gaps = [p["gap_in_bf16_steps"] for p in parted]
    report = {
        "answers": arguments.models,
        "tokens_each": arguments.new_tokens,
        "answers_that_part": len(parted),
        "control_answers_that_part": sum(p["control_parts"] for p in compared),
        "largest_gap_in_bf16_steps": max(gaps, default=0.0),
        "cases": parted,
    }
    if arguments.json:
        json.dump(report, sys.stdout)
        return
    print(f"{len(parted)} of {arguments.models} answers of {arguments.new_tokens} tokens part;")
    print(f"one plain pass over the finished answer parts in {report['control_answers_that_part']}")
    for p in parted:
        gap = f"{p['top2_gap']:.4f} = {p['gap_in_bf16_steps']:.1f} bf16 steps"
        print(f"  seed {p['seed']}: at token {p['step']}, top-2 gap {gap}")


if __name__ == "__main__":
    main()
