"""``specfuse align``: ``report`` on an adapter's features, ``calibrate`` for cosine acceptance."""

from __future__ import annotations

from pathlib import Path

import typer

from specfuse.cli import UserError, pick_device, print_json, shipped_or_given
from specfuse.cli.train import default_cache, progress


def align(
    action: str = typer.Argument(..., help="What to do: report, or calibrate for --accept cosine."),
    adapter: Path | None = typer.Option(None, help="Directory of the adapter."),
    pairs: Path | None = typer.Option(None, help="Features of both models (safetensors)."),
    target: Path | None = typer.Option(
        None, help="Directory of the target; with --drafter instead of a file."
    ),
    drafter: Path | None = typer.Option(
        None, help="Directory of the drafter, an EventGPT; calibrate: or a head, or a draft model."
    ),
    out: Path | None = typer.Option(None, help="calibrate: where to write, without an adapter."),
    clips: int = typer.Option(60, help="calibrate: held-out clips.", min=8),
    questions: int = typer.Option(6, help="calibrate: questions about each clip.", min=1),
    nodes: int = typer.Option(16, help="calibrate: drafted tokens that a pass verifies.", min=1, max=1023),
    features: str | None = typer.Option(
        None, help="Which features; those the adapter learned from if not given."
    ),
    preset: str = typer.Option("tiny", help="tiny: all 1,042 held-out clips; micro: a few."),
    png: Path | None = typer.Option(None, help="Write the figures as a picture too."),
    cache: Path | None = typer.Option(None, help="Where drawn clips are kept."),
    device: str = typer.Option("auto", help="cpu, cuda, ...; auto takes the GPU where there is one."),
    json: bool = typer.Option(False, "--json", help="Print the figures as JSON, alone on stdout."),
) -> None:
    """Compare features of held-out clips with the target's, before and after an adapter."""
    if action not in ("report", "calibrate"):
        raise UserError(f"ACTION must be report or calibrate, got {action!r}")
    # Before everything is measured, not after it.
    if png is not None and (png.is_dir() or not png.parent.is_dir()):
        raise UserError(f"--png must be a file in an existing directory, got {str(png)!r}")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out must be a directory, got the file {str(out)!r}")
    from transformers.utils import logging

    logging.set_verbosity_error()  # an error is one line alone
    logging.disable_progress_bar()
    device = str(pick_device(device))
    if action == "calibrate":
        from specfuse.cli.align_calibrate import calibrate_adapter

        calibrate_adapter(adapter, target, drafter, out, clips, questions, nodes, png, cache, device, json)
        return
    if adapter is None:
        raise UserError("report needs --adapter DIR")
    from specfuse.adapters import load_adapter
    from specfuse.train.adapter import trained_features
    from specfuse.train.adapter_card import (
        PUBLISHED_NOTE,
        note,
        rich_table,
        token_lines,
        write_report_picture,
    )
    from specfuse.train.adapter_report import align_report
    from specfuse.train.adapter_source import open_pairs
    from specfuse.train.presets import preset as find

    made = load_adapter(adapter).to(device)
    chosen = features or trained_features(adapter)
    with progress() as bars:
        found = open_pairs(
            pairs,
            shipped_or_given(target),
            shipped_or_given(drafter),
            chosen,
            find(preset),
            cache or default_cache(),
            device,
            bars,
        )
        bars("report", 0.0, f"{int(found.held_out.sum()):,} held-out samples")
        figures = align_report(made, found)
        bars("report", 1.0, f"{figures['samples']:,} held-out samples")
    if png is not None:
        if "after" not in figures:
            raise UserError("--png shows cosines; this adapter predicts tokens and has none")
        write_report_picture(png, figures)
    if json:
        print_json(figures)
        return
    if "after" in figures:
        from rich.console import Console

        Console().print(rich_table(figures))
        print(f"{note(figures)}\n{PUBLISHED_NOTE}")
    if "tokens" in figures:
        print(token_lines(figures["tokens"]))
