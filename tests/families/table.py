"""Compares every generative class of transformers with ``model.generate`` and writes a Markdown table.

python -m tests.families.table --out docs/families.md [--only NAME ...] [--jobs 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

from .build import classes
from .compare import Outcome, compare

SECONDS = 240
"""Time for one class."""

ORDER = ("wrong", "error", "equal", "plain only", "refused", "not comparable", "not built")
MEANING = {
    "equal": "tokens are those of model.generate in every comparison, trees were verified",
    "plain only": "tokens are those of model.generate, one a pass: no draft was verified",
    "refused": "a ValueError that names the class or the argument",
    "wrong": "tokens are not those of model.generate",
    "error": "some other exception",
    "not comparable": "model.generate itself fails for the small model, or does not repeat itself",
    "not built": "no small model could be made",
}


def outcomes(names: dict[str, list[str]], jobs: int) -> Iterator[Outcome]:
    """One outcome for each class, as they finish; each in a process of its own, ``jobs`` at once."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda item: in_process(item[0], item[1][0]), names.items())


def in_process(name: str, model_type: str, seconds: float = SECONDS) -> Outcome:
    """``compare`` in a forked process: a class that hangs or crashes takes nothing with it."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, model_type, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        return Outcome(name, model_type, "error", f"no result after {seconds:.0f} s")
    except EOFError:
        process.join()
        return Outcome(name, model_type, "error", f"the process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _child(name: str, model_type: str, sender: Connection) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    sender.send(compare(name, model_type))


def table(found: list[Outcome]) -> str:
    """The page: counts, what the words mean, and a row for each class."""
    counts = Counter(outcome.outcome for outcome in found)
    lines = [
        "# Generative classes of transformers",
        "",
        f"Small random models of {len(found)} classes of transformers {transformers.__version__} (PyTorch "
        f"{torch.__version__.split('+')[0]}, CPU, float64 where the class takes it), compared with greedy "
        "`model.generate`. Every class answers a short prompt, one longer than a sliding window, a padded "
        "batch and, where inputs could be made, one with pixels and one with sound: without a drafter, with "
        "right drafts among wrong siblings (tokens, and logits to 1e-4), with right chains, and twice with "
        "the default drafter.",
        "",
        "Made by `python -m tests.families.table --out docs/families.md`.",
        "",
        "| Outcome | Classes | Meaning |",
        "|---|---:|---|",
        *(f"| {word} | {counts[word]} | {MEANING[word]} |" for word in ORDER if counts[word]),
        "",
        "| Class | Outcome | Prompts | Drafts accepted | Remarks |",
        "|---|---|---|---:|---|",
    ]
    for outcome in found:
        remark = outcome.detail.replace("|", "\\|").replace("\n", " ")
        prompts = ", ".join(outcome.prompts)
        lines.append(f"| {outcome.name} | {outcome.outcome} | {prompts} | {outcome.accepted} | {remark} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Writes the table; 1 where a row is wrong or an error."""
    parser = argparse.ArgumentParser(prog="python -m tests.families.table", description=__doc__)
    parser.add_argument("--out", type=Path, help="where the Markdown goes; standard output without it")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these classes alone")
    parser.add_argument("--jobs", type=int, default=2, help="classes at once (default 2)")
    given = parser.parse_args(arguments)
    known = classes()
    unknown = set(given.only or []) - known.keys()
    if unknown:
        parser.error(f"transformers {transformers.__version__} has no generative class {sorted(unknown)}")
    names = {name: known[name] for name in given.only} if given.only else known
    begin, found = time.monotonic(), []
    for outcome in outcomes(names, given.jobs):
        found.append(outcome)
        line = f"[{len(found)}/{len(names)}] {outcome.name}: {outcome.outcome} {outcome.detail}"
        print(line, file=sys.stderr, flush=True)
    print(f"{len(found)} classes in {time.monotonic() - begin:.0f} s", file=sys.stderr)
    text = table(found)
    if given.out is None:
        print(text)
    else:
        given.out.write_text(text)
    return int(any(outcome.outcome in ("wrong", "error") for outcome in found))


if __name__ == "__main__":
    sys.exit(main())
