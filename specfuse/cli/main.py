"""Entry point of the ``specfuse`` command.

Only the sub-command that was asked for is imported, so that ``specfuse --help`` does not load torch.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from typing import Any

import typer

# name -> (module, function, one line for --help)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("specfuse.cli.demo", "demo", "Watch a trained miniature answer faster, with the same tokens."),
    "generate": ("specfuse.cli.generate", "generate", "Answer a question about a video."),
    "replay": ("specfuse.cli.replay", "replay", "Run recorded answers through a drafter; needs no model."),
    "plan": ("specfuse.cli.plan", "plan", "Should I speculate? Measure costs and drafts on a sample."),
    "doctor": ("specfuse.cli.doctor", "doctor", "Show versions, native code, backends; self-test every op."),
    "init-tiny": ("specfuse.cli.init_tiny", "init_tiny", "Write a tiny random Video-LLaVA directory."),
    "convert-eventgpt": (
        "specfuse.cli.convert_eventgpt",
        "convert_eventgpt",
        "Write an original EventGPT checkpoint for this package's class.",
    ),
    "align": ("specfuse.cli.align", "align", "How close an adapter brings a drafter to its target."),
    "events": ("specfuse.cli.events", "events", "Look at, draw, convert and simulate event recordings."),
    "train": ("specfuse.cli.train", "train", "Train a small model on the driving world."),
}


def build_app(wanted: str | None) -> typer.Typer:
    """The typer application, with ``wanted`` as the one command whose module is imported."""
    app = typer.Typer(
        name="specfuse",
        help="Lossless speculative decoding for video-language models.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def options(
        version: bool = typer.Option(False, "--version", help="Print the version and leave."),
    ) -> None:
        if version:
            print(metadata.version("specfuse"))
            raise typer.Exit

    for name, (module, function, line) in COMMANDS.items():
        command = getattr(import_module(module), function) if name == wanted else _placeholder
        if isinstance(command, typer.Typer):  # a command with commands of its own
            for part in command.registered_commands:
                part.callback = _telling(part.callback) if part.callback else None
            app.add_typer(command, name=name, short_help=line)
        else:
            app.command(name, short_help=line)(_telling(command))
    return app


class _Interrupted(Exception):
    """Ctrl-C, with what the interrupted command has to say about it."""


def _telling(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with Ctrl-C as an exception of ours: typer keeps the exit code alone."""

    @functools.wraps(command)
    def run_command(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            raise _Interrupted(str(stop)) from None

    return run_command


def _placeholder() -> None:
    """Stands in the list of --help for a command that was not asked for."""


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code: 0 done, 1 a failed check, 2 a mistake of the user."""
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    try:
        result = build_app(wanted)(list(arguments) or ["--help"], standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, _Interrupted, typer.Abort) as stop:
        return _fail(str(stop) or "interrupted", 130)
    except BrokenPipeError:
        # The reader of a pipe such as `specfuse ... | head` has left; Python must not flush into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, ArithmeticError, OSError) as error:
        if os.environ.get("SPECFUSE_DEBUG"):
            raise
        return _fail(_one_line(error), 2)
    except MemoryError as error:
        return _fail(f"not enough memory: {_one_line(error)}", 2)
    except Exception as error:
        # Usage errors of typer and of click have no public base class; this method is what they share.
        message: Callable[[], str] | None = getattr(error, "format_message", None)
        if message is None:
            raise
        code = getattr(error, "exit_code", 2)
        text = " ".join(message().split())
        # Without text, the help of a command without arguments has been shown.
        return _fail(_with_value(text, arguments), code) if text else code


def _with_value(message: str, arguments: Sequence[str]) -> str:
    """A usage error with the value that was given: typer names the option alone."""
    option = re.match(r"Invalid value for '(--[\w-]+)'", message)
    for at, argument in enumerate(arguments) if option else ():
        name, equals, value = argument.partition("=")
        if option and name == option[1] and (equals or at + 1 < len(arguments)):
            given = value if equals else arguments[at + 1]
            return message if repr(given) in message else f"{message}, got {given!r}"
    return message


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(text: str, code: int) -> int:
    print(f"specfuse: error: {text}", file=sys.stderr)
    return code


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
