"""``specfuse generate``: answers a question about a video file."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from specfuse.cli import UserError, load_head, model_directory, parse_nodes, pick_device, print_json, working

if TYPE_CHECKING:
    from specfuse.drafters import Drafter

_NAMED = ("auto", "corpus", "lookup", "none")
DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")


def generate(
    model: Path = typer.Option(..., help="Directory of a Hugging Face Video-LLaVA, or tiny-video-llava."),
    video: Path = typer.Option(..., help="Video file: anything PyAV reads, GIF included."),
    question: str = typer.Option(..., help="What to ask about the video."),
    drafter: str = typer.Option(
        "auto",
        help="auto (corpus and lookup), corpus, lookup, none, or the directory of a draft model, EventGPT, "
        "head or corpus (tiny-eventgpt, tiny-head, tiny-corpus: those that come with the package).",
    ),
    events: Path | None = typer.Option(
        None,
        help="Event recording of the scene, for an EventGPT as --drafter; formats as specfuse events reads.",
    ),
    nodes: str = typer.Option("32", help="Drafted tokens that one pass may verify; auto: as many as pay."),
    corpus: Path | None = typer.Option(
        None, help="File of remembered answers: read if it exists, written at the end."
    ),
    accept: str = typer.Option(
        "exact",
        help="exact, or a lossy rule: typical, semantic, or cosine:DIR (specfuse align calibrate).",
    ),
    max_disagreement: float | None = typer.Option(
        None, help="--accept cosine:DIR: share of the drafts it trusts that may disagree; 0.1 if not given."
    ),
    max_new_tokens: int = typer.Option(128, help="Longest answer, in tokens.", min=1),
    frames: int = typer.Option(8, help="Frames taken, spread evenly over the video.", min=1),
    temperature: float = typer.Option(0.0, help="0 is greedy; above, the answer is sampled.", min=0.0),
    seed: int = typer.Option(0, help="Seed of the sampling."),
    dtype: str = typer.Option(
        "auto", help=f"Weights: {', '.join(DTYPES)} (auto: as saved; float32 on a CPU)."
    ),
    device: str = typer.Option("auto", help="cpu, cuda, cuda:1, ...; auto takes the GPU where there is one."),
    compare: bool = typer.Option(
        False,
        "--compare",
        help="Also run model.generate; compare tokens and time. With a lossy --accept: compare with the "
        "lossless answer.",
    ),
    repeats: int = typer.Option(5, help="Timed repeats of --compare.", min=1),
    json: bool = typer.Option(False, "--json", help="Print JSON, alone on stdout."),
) -> int:
    """Answer a question about a video with exactly the tokens of model.generate, in fewer passes."""
    _check(dtype, question, drafter, corpus)
    _check_events(drafter, events)
    if max_disagreement is not None and not accept.startswith("cosine"):
        raise UserError(f"--max-disagreement belongs to --accept cosine:DIR, not to {accept!r}")
    max_nodes = parse_nodes(nodes)
    stream = None
    if events is not None:
        with working(f"reading {events}", shown=not json):
            from specfuse.events import load

            stream = load(events)
    with working(f"reading {video}", shown=not json):
        from specfuse.data.video import read_video

        clip = read_video(video, frames)
        import transformers  # noqa: F401 (takes seconds: under the spinner)
    target, processor, inputs = _load(model, dtype, device, clip, question, progress=not json)
    make_drafter = _drafter_factory(drafter, corpus, target, processor)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if target.generation_config.stop_strings is not None:
        options["tokenizer"] = processor.tokenizer
    if temperature > 0:
        options["temperature"] = temperature
    used = make_drafter()
    rule = accept
    if accept != "exact":
        from specfuse.cli.accept import parse_accept

        rule = parse_accept(accept, max_disagreement, target, processor.tokenizer)
    speculate = functools.partial(
        _speculate, target, inputs, nodes=max_nodes, seed=seed, options=options, events=stream, accept=rule
    )
    report = _answer(processor, inputs, functools.partial(speculate, used), stream=not json)
    report.update(drafter=drafter, nodes=max_nodes, device=str(target.device), dtype=str(target.dtype)[6:])
    report["random_weights"] = getattr(target.config, "random_weights_seed", None) is not None
    if compare and accept != "exact":
        from specfuse.cli.accept import compare_with_exact

        lossless = functools.partial(speculate, make_drafter(), accept="exact")
        report["compare"] = compare_with_exact(report, _answer(processor, inputs, lossless, stream=False))
    elif compare:
        from specfuse.cli.compare import compare_with_plain

        report["compare"] = compare_with_plain(
            speculate,
            functools.partial(_plain, target, inputs, seed=seed, options=options),
            make_drafter,
            sampled=temperature > 0,
            repeats=repeats,
            progress=not json,
        )
    if corpus is not None:
        _memory(used).save(corpus)
    if json:
        print_json(report)
    else:
        _print_summary(report)
    return 0 if not compare or report["compare"].get("tokens_equal", True) else 1


def _check(dtype: str, question: str, drafter: str, corpus: Path | None) -> None:
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if "<video>" in question or "<image>" in question:
        raise UserError("--question must not hold <video> or <image>: the video's place is set by the prompt")
    if corpus is not None and drafter not in ("auto", "corpus"):
        raise UserError(f"--corpus belongs to --drafter corpus or auto, not to {drafter!r}")
    # Before the answer is computed, not after it.
    if corpus is not None and (corpus.is_dir() or not corpus.parent.is_dir()):
        raise UserError(f"--corpus must be a file in an existing directory, got {str(corpus)!r}")


def _check_events(drafter: str, events: Path | None) -> None:
    sees = drafter not in _NAMED and _is_eventgpt(model_directory(drafter))
    if events is not None and not sees:
        raise UserError(f"--events belongs to an EventGPT's directory as --drafter, not to {drafter!r}")
    if sees and events is None:
        raise UserError(
            f"--drafter {drafter} is an EventGPT: it drafts from events, specfuse generate --events FILE"
        )


def _is_eventgpt(directory: str) -> bool:
    from specfuse.models.checkpoint import read_config

    is_model = Path(directory, "config.json").exists()
    return is_model and read_config(directory).get("model_type") == "eventgpt"


def _load(
    directory: Path, dtype: str, device: str, clip: Any, question: str, progress: bool
) -> tuple[Any, Any, Any]:
    """Returns the model, its processor and the inputs for the question."""
    import torch
    from transformers.utils import logging

    from specfuse.models.checkpoint import load_video_llava
    from specfuse.session import FIRST_TURN

    logging.set_verbosity_error()
    if not (progress and sys.stderr.isatty()):
        logging.disable_progress_bar()
    where = pick_device(device)
    # Half precision on a CPU is emulated: slower than float32, and the answer is less exact.
    wanted = "float32" if dtype == "auto" and where.type == "cpu" else dtype
    weights = wanted if wanted == "auto" else getattr(torch, wanted)
    model, processor = load_video_llava(model_directory(directory), dtype=weights, device=where)
    inputs = processor(text=FIRST_TURN.format(question=question), videos=clip, return_tensors="pt")
    return model, processor, inputs.to(where, model.dtype)


def _drafter_factory(
    name: str, corpus: Path | None, target: Any, processor: Any
) -> Callable[[], Drafter | None]:
    """Returns what makes a drafter as it is before the first question: what a model holds is loaded once."""
    from specfuse.data.miniature import CORPUS_FILE
    from specfuse.drafters import (
        CombinedDrafter,
        CorpusDrafter,
        ModelDrafter,
        PromptLookupDrafter,
        holds_head,
    )

    def remembering() -> CorpusDrafter:
        drafter = CorpusDrafter()
        return drafter.load(corpus) if corpus is not None and corpus.exists() else drafter

    if name == "none":
        return lambda: None
    if name == "lookup":
        return PromptLookupDrafter
    if name == "corpus":
        return remembering
    if name == "auto":
        return lambda: CombinedDrafter([remembering(), PromptLookupDrafter()])
    name = model_directory(name)
    if not Path(name).exists():
        raise UserError(f"--drafter must be auto, corpus, lookup, none or a model directory, got {name!r}")
    if (Path(name) / CORPUS_FILE).is_file():
        return lambda: CorpusDrafter().load(Path(name) / CORPUS_FILE)
    if holds_head(name):
        head_drafter = load_head("--drafter", name, target)
        return lambda: head_drafter
    from specfuse.models.checkpoint import load_draft_model, load_eventgpt, load_tokenizer

    if _is_eventgpt(name):
        from specfuse.drafters.event import EventDrafter

        eventgpt = load_eventgpt(name, dtype=target.dtype, device=target.device)
        # A new one has seen no scene yet: the first answer's time includes encoding the events.
        return lambda: EventDrafter(*eventgpt, processor)
    draft_model = load_draft_model(name, dtype=target.dtype, device=target.device)
    if not Path(name, "tokenizer_config.json").exists():
        return lambda: ModelDrafter(draft_model)
    tokenizers = {"tokenizer": load_tokenizer(name), "target_tokenizer": processor}
    return lambda: ModelDrafter(draft_model, **tokenizers)


def _memory(drafter: Any) -> Any:
    """The CorpusDrafter in a drafter made by --drafter corpus or auto."""
    return drafter.drafters[0] if hasattr(drafter, "drafters") else drafter


def _plain(target: Any, inputs: Any, *, seed: int, options: Any) -> Any:
    import torch

    torch.manual_seed(seed)
    return target.generate(**inputs, **options, return_dict_in_generate=True)


def _speculate(
    target: Any,
    inputs: Any,
    drafter: Any,
    *,
    nodes: int | str,
    seed: int,
    options: Any,
    events: Any = None,
    accept: Any = "exact",
    streamer: Any = None,
) -> Any:
    from specfuse.generate import generate as speculative_generate

    return speculative_generate(
        target,
        drafter,
        max_nodes=nodes,
        accept=accept,
        seed=seed,
        streamer=streamer,
        return_dict_in_generate=True,
        events=None if drafter is None else events,
        **inputs,
        **options,
    )


def _answer(processor: Any, inputs: Any, speculate: Callable[..., Any], stream: bool) -> dict[str, Any]:
    """Answers once, streaming to stdout if asked; returns what the summary shows."""
    from transformers import TextStreamer

    tokenizer = processor.tokenizer
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    start = time.perf_counter()
    output = speculate(streamer=streamer)
    seconds = time.perf_counter() - start
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return {
        "answer": tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        "token_ids": tokens,
        "seconds": seconds,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "acceptance": output.acceptance,
        **output.stats.as_dict(),
    }


def _print_summary(report: dict[str, Any]) -> None:
    speed = f"{report['passes']} passes ({report['tokens_per_pass']:.2f} per pass), {report['seconds']:.2f} s"
    where = f"on {report['device']} in {report['dtype']}; drafter {report['drafter']}"
    print(f"\n{report['tokens']} tokens in {speed} {where}")
    if not report["acceptance"]["lossless"]:
        from specfuse.cli.accept import lossy_line

        print(lossy_line(report["acceptance"]))
    if "lossless_answer" in report.get("compare", {}):
        from specfuse.cli.accept import cost_lines

        print("\n".join(cost_lines(report["compare"])))
    elif "compare" in report:
        from specfuse.cli.compare import comparison_lines

        print("\n".join(comparison_lines(report)))
    if report["random_weights"]:
        print("The weights are random (specfuse init-tiny): neither the text nor the speed means anything.")
