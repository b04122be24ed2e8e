"""End-to-end answers: specfuse against model.generate and Hugging Face's prompt lookup, same inputs, one run.

    python benchmarks/bench_generate.py [--json] [--rounds 12] [--hidden 256 --layers 4]

Input: a random Video-LLaVA (so the tokens mean nothing; the work of a pass is real), 8 frames of 224 px
(2,056 video tokens) or --image-size, a 32-token question, 64 new tokens, greedy, batch 1. Every round runs
all systems in turn; medians are compared as ratios to model.generate. Outputs are compared first: a system
whose tokens differ ends the run.

`plain` is specfuse with drafter=None: what the loop itself costs. With drafter="auto": `first` has learned
nothing yet; `unrelated` has answered eight other questions, whose answers are of no help here (nothing can be
predicted); `repeated` has answered this very question, the best case of remembering. None of them stands for
real answers: see `specfuse replay` for those.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

import specfuse

FRAMES, QUESTION = 8, 32


def random_model(hidden: int, layers: int, image_size: int) -> Any:
    """Video-LLaVA of the usual layout (patch 14, CLS kept), random weights wide enough that answers vary."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=hidden,
        intermediate_size=int(2.6875 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=8,
    )
    torch.manual_seed(0)
    config = VideoLlavaConfig(vision_config=vision, text_config=text)
    model = VideoLlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
        model.lm_head.weight[[config.image_token_index, config.video_token_index]] = 0
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def request(model: Any, seed: int = 1) -> dict[str, Tensor]:
    """One clip and one question."""
    generator = torch.Generator().manual_seed(seed)
    question = torch.randint(3, 30000, (QUESTION,), generator=generator).tolist()
    size = model.config.vision_config.image_size
    video = [model.config.video_token_index] * (FRAMES * ((size // 14) ** 2 + 1))
    ids = [1, 10, 11, *video, *question]
    pixels = torch.randn(1, FRAMES, 3, size, size, generator=generator)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    return {**inputs, "pixel_values_videos": pixels}


def _auto() -> specfuse.CombinedDrafter:
    """What drafter="auto" is, with nothing remembered."""
    return specfuse.CombinedDrafter([specfuse.CorpusDrafter(), specfuse.PromptLookupDrafter()])


class _Deaf(specfuse.Drafter):
    """A drafter that is not told the answers."""

    def __init__(self, drafter: specfuse.Drafter):
        self.drafter = drafter

    def propose(self, state: specfuse.DraftState, max_nodes: int) -> specfuse.TokenTree:
        return self.drafter.propose(state, max_nodes)


def systems(model: Any, inputs: dict[str, Tensor], new_tokens: int) -> dict[str, Callable[[], Tensor]]:
    """Every competitor as a function of no arguments that returns the sequences."""
    options = {**inputs, "max_new_tokens": new_tokens, "do_sample": False}
    taught, elsewhere = _auto(), _auto()
    for seed in range(2, 10):
        specfuse.generate(model, elsewhere, **{**options, **request(model, seed)})

    return {
        "model.generate": lambda: model.generate(**options),
        "specfuse plain": lambda: specfuse.generate(model, None, **options),
        "specfuse first": lambda: specfuse.generate(model, _auto(), **options),
        "specfuse unrelated": lambda: specfuse.generate(model, _Deaf(elsewhere), **options),
        "specfuse repeated": lambda: specfuse.generate(model, taught, **options),
        "specfuse lookup": lambda: specfuse.generate(model, specfuse.PromptLookupDrafter(), **options),
        "HF prompt lookup": lambda: model.generate(**options, prompt_lookup_num_tokens=10),
    }


def measure(competitors: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each system, one sample per round, after a round that compares the tokens."""
    expected = competitors["model.generate"]()
    for name, run in competitors.items():
        if not torch.equal(run(), expected):
            raise SystemExit(f"{name} gave other tokens than model.generate")
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for index in range(rounds):
        # Another order each round, so that what runs after whom averages out.
        order = list(competitors)[index % len(competitors) :] + list(competitors)[: index % len(competitors)]
        for name in order:
            start = time.perf_counter()
            competitors[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = random_model(arguments.hidden, arguments.layers, arguments.image_size).to(arguments.device)
    inputs = {name: value.to(arguments.device) for name, value in request(model).items()}
    times = measure(systems(model, inputs, arguments.new_tokens), arguments.rounds)
    base = statistics.median(times["model.generate"])
    rows = []
    for name, values in times.items():
        p20, p50, p80 = (statistics.quantiles(values, n=10)[i] for i in (1, 4, 7))
        rows.append({"system": name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "speedup": base / p50})
    report = {
        "hardware": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": f"random Video-LLaVA, hidden {arguments.hidden}, {arguments.layers} layers, 32,064 tokens",
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": arguments.new_tokens,
        "rows": rows,
    }
    if arguments.json:
        json.dump(report, sys.stdout)
        return
    print(f"{report['model']}; prompt of {report['prompt_tokens']:,} tokens, {arguments.new_tokens} new")
    for row in rows:
        times_ms = "  ".join(f"{name} {row[f'{name}_ms']:8.1f}" for name in ("p20", "p50", "p80"))
        print(f"{row['system']:18} {times_ms} ms   {row['speedup']:5.2f}x")


if __name__ == "__main__":
    main()
