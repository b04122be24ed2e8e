"""Time to the first token of the first and of a later question about a clip, with and without the cache.

    python benchmarks/bench_vision_cache.py                       # CPU-sized, random weights
    python benchmarks/bench_vision_cache.py --model DIR --device cuda --dtype float16

Input: 8 frames of 224 x 224 random pixels (8 x 257 = 2,056 video tokens), a 4-token prologue, a 32-token
question. Every round asks in turn (interleaved, so that a slow moment of the machine hits all): uncached;
cached, a new clip (what the bookkeeping costs); cached, a clip seen before. `check` is the time of the model
fingerprint alone, part of both cached cases. Before anything is timed, cached logits and tokens are compared
with uncached ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from specfuse.vision.cache import VisionCache, patched
from specfuse.vision.fingerprint import ModelFingerprint

QUESTION, PROLOGUE = 32, 4


def random_model(hidden: int, layers: int) -> Any:
    """Video-LLaVA of the real layout (224 px, patch 14, 257 tokens a frame), narrow, with random weights."""
    vision = CLIPVisionConfig(
        hidden_size=hidden // 2,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        image_size=224,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=hidden,
        intermediate_size=int(2.6875 * hidden),  # 11008 / 4096, as in LLaMA-7B
        num_hidden_layers=layers,
        num_attention_heads=8,
    )
    torch.manual_seed(0)
    model = VideoLlavaForConditionalGeneration(VideoLlavaConfig(vision_config=vision, text_config=text))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # at the usual 0.02 every answer is one token repeated
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
    return model


def request(model: Any, frames: int, clip: int, question: int) -> dict[str, Tensor]:
    """Prompt `BOS + 3 tokens, the clip, 32 question tokens` and the pixels, from two seeds."""
    vision, size = model.config.vision_config, model.config.vision_config.image_size
    tokens = frames * ((size // vision.patch_size) ** 2 + 1)
    text = torch.randint(3, 30000, (QUESTION,), generator=torch.Generator().manual_seed(question)).tolist()
    ids = [1, 10, 11, 12] + [model.config.video_token_index] * tokens + text
    pixels = torch.randn(1, frames, 3, size, size, generator=torch.Generator().manual_seed(clip))
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values_videos": pixels.to(model.dtype)}
    return {name: value.to(model.device) for name, value in inputs.items()}


def generate(model: Any, inputs: dict[str, Tensor], tokens: int = 1) -> Any:
    """Greedy answer of plain `model.generate`, with its logits."""
    return model.generate(
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )


def timed_ms(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def check(model: Any, frames: int) -> None:
    """Cached answers are the uncached ones, or there is nothing to time.

    Tokens are compared in float32 and wider only: in half precision a near-tie may fall either way.
    """
    inputs = request(model, frames, clip=0, question=1)
    expected = generate(model, inputs, 8)
    with patched(model) as cache:
        generate(model, request(model, frames, clip=0, question=0))
        got = generate(model, inputs, 8)
        assert cache.stats.hits == 1, cache.stats
    eps = torch.finfo(model.dtype).eps
    largest = expected.logits[0].abs().max().item()
    error = (got.logits[0] - expected.logits[0]).abs().max().item()
    if error > 64 * eps * largest:
        raise SystemExit(f"cached logits differ by {error:.3g} (largest logit {largest:.3g}, eps {eps:.1e})")
    if eps < 1e-6 and not torch.equal(got.sequences, expected.sequences):
        raise SystemExit(f"cached answer {got.sequences[0, -8:]} is not {expected.sequences[0, -8:]}")


def measure(model: Any, frames: int, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Milliseconds per case and round, and the bytes of one clip's entry."""
    times: dict[str, list[float]] = {
        "uncached": [],
        "cached_new_clip": [],
        "cached_seen_clip": [],
        "check": [],
    }
    fingerprint = ModelFingerprint(model)
    fingerprint.digest()
    cache = VisionCache(max_bytes=2**40)
    for i in range(rounds):
        new, seen = request(model, frames, i, 2 * i), request(model, frames, i, 2 * i + 1)
        times["uncached"].append(timed_ms(lambda new=new: generate(model, new)))
        with patched(model, cache):
            times["cached_new_clip"].append(timed_ms(lambda new=new: generate(model, new)))
            times["cached_seen_clip"].append(timed_ms(lambda seen=seen: generate(model, seen)))
        times["check"].append(timed_ms(fingerprint.digest))
        nbytes = cache.nbytes
        cache.clear()
    return times, nbytes


def hardware(device: str) -> str:
    """Name of the device that ran it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} (CPU), {torch.get_num_threads()} threads"


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="directory of a Video-LLaVA; default: random weights")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    if args.model:
        model: Any = VideoLlavaForConditionalGeneration.from_pretrained(args.model)
    else:
        model = random_model(args.hidden, args.layers)
    model = model.to(args.device, getattr(torch, args.dtype)).eval()
    check(model, args.frames)
    times, nbytes = measure(model, args.frames, args.rounds)
    report: dict[str, Any] = {
        "hardware": hardware(args.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": args.model or f"random, hidden {args.hidden}, {args.layers} layers, {args.dtype}",
        "video_tokens": request(model, args.frames, 0, 0)["input_ids"].shape[1] - QUESTION - PROLOGUE,
        "rounds": args.rounds,
        "entry_mb": nbytes / 1e6,
    }
    for name, values in times.items():
        p20, p50, p80 = (statistics.quantiles(values, n=10, method="inclusive")[i] for i in (1, 4, 7))
        report[f"{name}_ms"] = {"p20": round(p20, 2), "p50": round(p50, 2), "p80": round(p80, 2)}
    report["ratio_p50"] = round(report["uncached_ms"]["p50"] / report["cached_seen_clip_ms"]["p50"], 2)
    if args.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        print(f"{name:22} {value}")


if __name__ == "__main__":
    main()
