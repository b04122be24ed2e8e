"""``specfuse plan``: should I speculate on these questions, and with how many nodes?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from specfuse.cli import UserError, print_json, working
from specfuse.cli.generate import DTYPES, _check, _check_events, _drafter_factory, _load


def plan(
    model: Path = typer.Option(..., help="Directory of a Hugging Face Video-LLaVA."),
    video: list[Path] = typer.Option(..., help="Video file; repeat it for several."),
    question: list[str] = typer.Option(..., help="What to ask about each video; repeat it for several."),
    drafter: str = typer.Option(
        "auto", help="auto (corpus and lookup), corpus, lookup, or the directory of a draft model."
    ),
    nodes: str = typer.Option("2,4,8,16,32,64", help="Tree sizes to try."),
    max_new_tokens: int = typer.Option(64, help="Longest answer, in tokens.", min=2),
    rounds: int = typer.Option(15, help="Timed passes of each tree size.", min=3),
    frames: int = typer.Option(8, help="Frames taken, spread evenly over a video.", min=1),
    temperature: float = typer.Option(0.0, help="0 is greedy; above, the answers are sampled.", min=0.0),
    seed: int = typer.Option(0, help="Seed of the sampling."),
    dtype: str = typer.Option(
        "auto", help=f"Weights: {', '.join(DTYPES)} (auto: as saved; float32 on a CPU)."
    ),
    device: str = typer.Option("auto", help="cpu, cuda, cuda:1, ...; auto takes the GPU where there is one."),
    json: bool = typer.Option(False, "--json", help="Print JSON, alone on stdout."),
) -> int:
    """Measure passes, drafts and acceptance on a sample; print the expected speed-up of each tree size.

    Every question is asked about every video, in this order, by a drafter that starts out knowing nothing.
    """
    sizes = _sizes(nodes)
    for each in question:
        _check(dtype, each, drafter, None)
    _check_events(drafter, None)
    if drafter == "none":
        raise UserError("--drafter none drafts nothing: plain decoding is what plan compares with")
    with working("reading videos", shown=not json):
        from specfuse.data.video import read_video

        clips = [read_video(path, frames) for path in video]
        import transformers  # noqa: F401 (takes seconds: under the spinner)
    target, processor, _ = _load(model, dtype, device, clips[0], question[0], progress=not json)
    sample = _sample(target, processor, clips, question, temperature)
    used = _drafter_factory(drafter, None, target, processor)()
    found = _measure(target, sample, used, sizes, max_new_tokens, rounds, seed, json)
    random_weights = getattr(target.config, "random_weights_seed", None) is not None
    if json:
        print_json({"drafter": drafter, "random_weights": random_weights, **found.as_dict()})
        return 0
    from specfuse.speedup import WHY_THEY_DIFFER

    print(f"{found}\n\nThe two formulas for chains: {WHY_THEY_DIFFER}")
    if random_weights:
        print("The weights are random (specfuse init-tiny): neither the text nor the speed means anything.")
    return 0


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or not all(1 <= size <= 1023 for size in sizes):
        raise UserError(f"--nodes must be numbers from 1 to 1023 with commas between them, got {text!r}")
    return sizes


def _sample(
    target: Any, processor: Any, clips: list[Any], questions: list[str], temperature: float
) -> list[dict[str, Any]]:
    """The arguments of one call per clip and question."""
    from specfuse.session import FIRST_TURN

    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    sample = []
    for clip in clips:
        for question in questions:
            inputs = processor(text=FIRST_TURN.format(question=question), videos=clip, return_tensors="pt")
            sample.append({**inputs.to(target.device, target.dtype), **options})
    return sample


def _measure(
    target: Any,
    sample: list[dict[str, Any]],
    drafter: Any,
    sizes: list[int],
    max_new_tokens: int,
    rounds: int,
    seed: int,
    quiet: bool,
) -> Any:
    from rich.console import Console
    from rich.progress import Progress

    from specfuse.plan import plan as make_plan
    from specfuse.vision.cache import patched

    hidden = quiet or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar, patched(target):
        task = bar.add_task("measuring", total=1 + len(sample) * (1 + len(set(sizes))))
        return make_plan(
            target,
            sample,
            drafter,
            sizes,
            max_new_tokens=max_new_tokens,
            rounds=rounds,
            seed=seed,
            progress=lambda: bar.advance(task),
        )
