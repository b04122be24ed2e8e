"""``specfuse init-tiny DIR``: a tiny Video-LLaVA directory to try everything on."""

from __future__ import annotations

from pathlib import Path

import typer

from specfuse.cli import UserError, working


def init_tiny(
    directory: Path = typer.Argument(..., help="Directory to write; created if missing."),
    seed: int = typer.Option(0, help="Seed of the random weights."),
    force: bool = typer.Option(False, "--force", help="Write into a directory that is not empty."),
) -> None:
    """Write a tiny Video-LLaVA: Hugging Face class, RANDOM weights, real processor and tokenizer."""
    with working("building"):
        from transformers.utils import logging

        from specfuse.models.tiny import init_tiny as write

        logging.disable_progress_bar()
        try:
            write(directory, seed=seed, force=force)
        except FileExistsError as error:
            raise UserError(f"{error} (--force overwrites)") from None
    size_kib = sum(p.stat().st_size for p in directory.iterdir() if p.is_file()) // 1024
    print(f"{directory}: tiny Video-LLaVA with random weights (seed {seed}), {size_kib} KiB")
    example = directory / "example.gif"
    print(f"try: specfuse generate --model {directory} --video {example} --question 'What is happening?'")
