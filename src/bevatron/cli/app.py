"""The command-line program, and what its verbs share: options, and how results are shown."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import bevatron
from bevatron.errors import BevatronError

# What the help sorts verbs by, in this order.
CONVERT, TRAIN, COMPRESS, GENERATE = "Convert", "Train", "Compress", "Generate and evaluate"
CLUSTER, OTHER = "Machines and clusters", "More"
GROUPS = (CONVERT, TRAIN, COMPRESS, GENERATE, CLUSTER, OTHER)


class Verbs(TyperGroup):
    """The help lists verbs by what they are for, each with its whole first sentence."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for name, command in self.commands.items():
            said = command.get_short_help_str(1000)
            groups[getattr(command, "rich_help_panel", OTHER)].append((name, said))
        width = max(map(len, self.commands))
        for title, rows in groups.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:<{width}}", said) for name, said in rows])


app = typer.Typer(
    name="bevatron",
    cls=Verbs,
    help="From Hugging Face to a training cluster and back: convert, train in 3D, generate.\n\n"
    "`bevatron VERB --help` has the options of a verb.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace DST; the old one stays until the new is whole.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show what would be done, tensor by tensor; write nothing."),
]
Dtype = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: as stored.")]
AcceptField = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="A field of config.json that does nothing, though unknown; repeatable."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Other values than the configuration's."),
]
Checkpoint = Annotated[
    str, typer.Argument(metavar="CKPT", help="Native checkpoint, run, HF folder or Hub id.")
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option(help="1 keeps all.")]
TopK = Annotated[int | None, typer.Option(help="0 keeps all.")]
MinP = Annotated[float | None, typer.Option(help="Share of the likeliest token's probability.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="1 is none.")]
ChatTemplateFile = Annotated[Path | None, typer.Option(help="Instead of the checkpoint's own.")]
TensorParallel = Annotated[int, typer.Option(min=1, help="Processes that share each layer.")]
PipelineParallel = Annotated[int, typer.Option(min=1, help="Processes that share the layers.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps; default: what is here, but not mps."),
]
Int8 = Annotated[bool, typer.Option("--int8", help="8-bit weights, on CPUs.")]


def _version(show: bool) -> None:
    if show:
        print(f"bevatron {bevatron.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    show_help(context)


def show_help(context: typer.Context) -> None:
    """What a group of verbs does if none is named."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def known(option: str, value: str, *known: str) -> None:
    if value not in known:
        raise BevatronError(f"{option} {value}: not supported yet; use {', '.join(known)}")


def no_blas() -> None:
    """numpy's BLAS reserves memory for every core when loaded; conversion multiplies nothing."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def show(values: dict[str, Any], as_json: bool) -> None:
    """One JSON object, or a line per key."""
    if as_json:
        print(json.dumps(values))
        return
    width = max(len(key) for key in values)
    for key, value in values.items():
        print(f"{key:<{width}}  {_plain(value)}")


def rounded(value: Any) -> Any:
    """With as many digits as people read."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return "".join(f"\n  {_plain(v)}" for v in value) or "none"
    return "none" if value is None else str(value)
