"""The command line's entry point. A verb's signature is its interface, its docstring its help."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from bevatron.cli.app import OTHER, app
from bevatron.errors import failure
from bevatron.train.processes_and_signals import end_with_agent

# Their verbs, in the order of the help.
from bevatron.cli import convert, train, compress, align, generate  # noqa: F401  # isort: skip


@app.command(rich_help_panel=OTHER)
def demo(
    source: Annotated[str | None, typer.Argument(help="HF folder or Hub id to start from.")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Everything goes in here.")] = Path("demo"),
    steps: Annotated[int, typer.Option(min=5, help="Training steps at each layout.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete --dir first.")] = False,
) -> None:
    """The whole tour: convert a real model, ask it, teach it a fact, resume, export, ask again."""
    from bevatron.demo import demo as tour

    tour(source, folder, steps=steps, overwrite=overwrite)


def main() -> None:
    """Run a verb; every failure is one message and a status, never a traceback."""
    end_with_agent()
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may be any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _fail(*_described(error))
    if status == 130:  # typer has caught the KeyboardInterrupt already
        _fail("interrupted", 130)
    sys.exit(status if isinstance(status, int) else 0)


def _described(error: Exception) -> tuple[str, int]:
    """Message and status of a usage error or any other."""
    context = getattr(error, "ctx", None)
    if hasattr(error, "format_message"):  # typer's, wherever this version of it keeps the class
        hint = f" See `{context.command_path} --help`." if context is not None else ""
        return f"{error.format_message()}{hint}", 2
    described = failure(error)
    return str(described), described.exit_status


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)
