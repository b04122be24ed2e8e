"""``specfuse demo``: a trained miniature answers several times faster, and says the same."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from specfuse.cli import UserError, load_head, parse_nodes, print_json, working

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from specfuse.demo import AskedClip, DemoResult
    from specfuse.drafters import Drafter

WHAT = (
    "Timed from frames and question to the last token, processor included. model.generate encodes the video "
    "for every question; so does Hugging Face's prompt lookup, which drafts from the prompt and the answer; "
    "specfuse keeps encoded videos and drafts from what the model said before, learning on the way."
)


def demo(
    clips: int = typer.Option(4, help="Held-out clips.", min=1),
    questions: int = typer.Option(6, help="Questions about each clip.", min=1),
    nodes: str = typer.Option("16", help="Drafted tokens that one pass may verify; auto: as many as pay."),
    seed: int = typer.Option(0, help="Which clips and questions."),
    html: Path | None = typer.Option(None, help="Also write a page: frames, events, coloured answers."),
    model: Path | None = typer.Option(None, help="Directory of another Video-LLaVA than the shipped one."),
    corpus: Path | None = typer.Option(None, help="Other remembered answers than the shipped ones."),
    head: Path | None = typer.Option(None, help="Draft from a head too: directory by `specfuse train head`."),
    threads: int = typer.Option(1, help="Threads of torch; tiny matrices seldom gain by more.", min=1),
    json: bool = typer.Option(False, "--json", help="Print JSON, alone on stdout."),
) -> int:
    """Ask about held-out clips through model.generate, prompt lookup and specfuse; compare tokens, time."""
    from rich.console import Console

    max_nodes = parse_nodes(nodes)
    if html is not None and (html.is_dir() or not html.parent.is_dir()):
        raise UserError(f"--html must be a file in an existing directory, got {str(html)!r}")
    if seed < 0:
        raise UserError(f"--seed must be 0 or above, got {seed}")
    console = Console(stderr=json)
    with working("loading", shown=not json):
        import torch

        torch.set_num_threads(threads)
        from specfuse.demo import Contest, choose, run_demo

        chosen = choose(clips, questions, seed)
        target, processor = _load(model)
        contest = Contest(target, processor, _drafter(target, model is None, corpus, head), max_nodes)
    total = sum(len(asked.questions) for asked in chosen)
    with _table(console, total, transient=json) as tell:
        result = run_demo(contest, chosen, seed, tell)
    if html is not None:
        from specfuse.demo_page import write_page

        html.write_text(write_page(result, chosen, processor.tokenizer, _versions()), encoding="utf-8")
    if json:
        print_json({**result.as_dict(), "nodes": max_nodes, "seed": seed, "versions": _versions()})
    else:
        _print_summary(result, console, html)
    return 0 if result.identical else 1


def _load(directory: Path | None) -> tuple[Any, Any]:
    import torch
    from transformers.utils import logging

    from specfuse.data import miniature
    from specfuse.models.checkpoint import load_video_llava

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if directory is None:
        return miniature.load_target()
    return load_video_llava(directory, dtype=torch.float32)


def _drafter(target: Any, shipped: bool, corpus: Path | None, head: Path | None) -> Drafter:
    from specfuse.data import miniature
    from specfuse.drafters import CombinedDrafter, CorpusDrafter

    if corpus is not None:
        remembered = CorpusDrafter().load(corpus)
    else:
        # What the shipped model said is of no use to another one.
        known = shipped and "tiny-corpus" in miniature.shipped()
        remembered = miniature.load_corpus() if known else CorpusDrafter()
    if head is None:
        return remembered
    return CombinedDrafter([remembered, load_head("--head", head, target)])


def _versions() -> str:
    import torch
    import transformers

    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{platform.machine()} CPU, {threads}, {libraries}"


@contextmanager
def _table(console: Console, total: int, transient: bool) -> Iterator[Any]:
    """A table that grows with the answers; yields the function that is told about them."""
    from rich.console import Group
    from rich.live import Live

    with Live("warming up", console=console, transient=transient, refresh_per_second=8) as live:

        def tell(result: DemoResult, clip: AskedClip) -> None:
            done, last = len(result.answered), result.answered[-1]
            state = (
                f"question {done} of {total}, clip {clip.index}: {last.question.text}" if done < total else ""
            )
            live.update(Group(*_lines(result), state))

        yield tell


def _lines(result: DemoResult) -> list[RenderableType]:
    from rich.table import Table

    from specfuse.demo import SPECFUSE, SYSTEMS

    table = Table()
    table.add_column("system", no_wrap=True)
    for name in ("tokens/s", "tokens a pass", "first token", "later questions", "specfuse faster"):
        table.add_column(name, justify="right")
    for system in SYSTEMS:
        first, later = (result.first_token_seconds(system, later=turn) for turn in (False, True))
        times = ["" if seconds is None else f"{seconds * 1e3:.1f} ms" for seconds in (first, later)]
        faster = "" if system == SPECFUSE else f"{result.speedup(system):.2f}x"
        speed = f"{result.tokens_per_second(system):.0f}"
        table.add_row(system, speed, f"{result.tokens_per_pass(system):.2f}", *times, faster)
    return [table, f"vision cache: {result.hits} hits, {result.misses} misses"]


def _print_summary(result: DemoResult, console: Console, html: Path | None) -> None:
    from specfuse.demo import GENERATE, LOOKUP

    verdict = "the same in all three" if result.identical else "NOT THE SAME"
    count = sum(len(each.timed[GENERATE].tokens) for each in result.answered)
    lines = [
        f"tokens: {verdict}, {count} of them in {len(result.answered)} answers",
        f"specfuse over model.generate: {result.speedup(GENERATE):.2f}x (median of questions), "
        f"{result.total_speedup(GENERATE):.2f}x in total; {result.decode_speedup(GENERATE):.2f}x from the "
        "first token on, where the vision cache saves nothing",
        f"specfuse over prompt lookup: {result.speedup(LOOKUP):.2f}x (median of questions), "
        f"{result.total_speedup(LOOKUP):.2f}x in total",
    ]
    if (ratio := result.ttft_second_question_ratio) is not None:
        lines.append(f"a clip's second question: first token after {ratio:.2f} of the first question's time")
    lines += ["", WHAT, _versions()]
    if html is not None:
        lines.append(f"{html}: frames, events, and the answers with accepted drafts coloured")
    console.print("\n".join(lines), highlight=False)
