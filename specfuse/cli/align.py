"""``specfuse align report``: cosine similarity of drafter and target features before and after an adapter."""

from __future__ import annotations

from pathlib import Path

import typer

from specfuse.cli import UserError, pick_device, print_json
from specfuse.cli.train import default_cache, progress


def align(
    action: str = typer.Argument(..., help="What to do: report."),
    adapter: Path = typer.Option(..., help="Directory of the adapter."),
    pairs: Path | None = typer.Option(None, help="Features of both models (safetensors)."),
    target: Path | None = typer.Option(
        None, help="Directory of the target; with --drafter instead of a file."
    ),
    drafter: Path | None = typer.Option(None, help="Directory of the drafter, an EventGPT."),
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
    if action != "report":
        raise UserError(f"ACTION must be report, got {action!r}")
    # Before everything is measured, not after it.
    if png is not None and (png.is_dir() or not png.parent.is_dir()):
        raise UserError(f"--png must be a file in an existing directory, got {str(png)!r}")
    from transformers.utils import logging

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

    logging.set_verbosity_error()  # an error is one line alone
    logging.disable_progress_bar()
    device = str(pick_device(device))
    made = load_adapter(adapter).to(device)
    chosen = features or trained_features(adapter)
    with progress() as bars:
        found = open_pairs(
            pairs, target, drafter, chosen, find(preset), cache or default_cache(), device, bars
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
