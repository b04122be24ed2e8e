"""``specfuse convert-eventgpt CHECKPOINT OUT``: the published EventGPT for this package's class."""

from __future__ import annotations

from pathlib import Path

import typer

from specfuse.cli import print_json, working


def convert_eventgpt(
    checkpoint: Path = typer.Argument(..., help="Directory of an original EventGPT checkpoint."),
    out: Path = typer.Argument(..., help="Directory to write; created if missing."),
    json: bool = typer.Option(False, "--json", help="Print what was done as JSON, alone on stdout."),
) -> None:
    """Write an original EventGPT checkpoint as a directory for EventGptForConditionalGeneration."""
    with working("converting"):
        from transformers.utils import logging

        from specfuse.models.eventgpt_convert import convert_eventgpt as convert

        logging.disable_progress_bar()
        done = convert(checkpoint, out)
    if json:
        print_json({"parameters": done.parameters, "unmatched": done.unmatched})
        return
    print(f"{out}: EventGPT with {done.parameters:,} parameters")
    for name in done.unmatched:
        print(f"left out, the model has no place for it: {name}")
