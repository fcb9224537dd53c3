"""Verbs between Hugging Face folders, Nanotron and native checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from bevatron.cli.app import (
    CONVERT,
    AcceptField,
    DryRun,
    Dtype,
    Json,
    Overwrite,
    app,
    known,
    no_blas,
    show,
)
from bevatron.errors import BevatronError, CheckFailed


@app.command("import", rich_help_panel=CONVERT)
def import_(
    src: Annotated[
        str, typer.Argument(help="A Hugging Face folder, Hub id or Nanotron checkpoint.")
    ],
    dst: Annotated[str, typer.Argument(help="The native checkpoint to make; a folder or a URL.")],
    dtype: Dtype = None,
    source_format: Annotated[str, typer.Option("--from", help="auto, hf or nanotron.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    accept_field: AcceptField = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Convert a Hugging Face or Nanotron model into a native checkpoint."""
    no_blas()
    from bevatron.bridge.convert import import_checkpoint

    known("--from", source_format, "auto", "hf", "nanotron")
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "overwrite": overwrite}
    options |= {"source_format": source_format, "accept": accept_field or ()}
    if dry_run:
        from bevatron.bridge.conversion_preview import preview_import

        seen = preview_import(src, dst, **options)
        print(json.dumps(seen.to_dict()) if as_json else seen.text())
        return
    values = import_checkpoint(src, dst, **options).to_dict()
    if not as_json:
        del values["identical"]  # it tells of exports alone
    show(values, as_json)


@app.command(rich_help_panel=CONVERT)
def export(
    src: Annotated[str, typer.Argument(help="A native checkpoint or a run; a folder or a URL.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make.")],
    target_format: Annotated[
        str, typer.Option("--to", help="hf, nanotron, or peft: a run's adapter alone.")
    ] = "hf",
    dtype: Dtype = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Such as 5GB; default: the source's shards, else 5GB.")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Convert a native checkpoint or a run into a Hugging Face folder or a Nanotron checkpoint; or
    a run's adapter into a folder of peft."""
    no_blas()
    from bevatron.bridge.convert import export_checkpoint

    known("--to", target_format, "hf", "nanotron", "peft")
    if target_format == "peft":
        from bevatron.bridge.peft_adapter import export_adapter

        for option, given in (("--dry-run", dry_run), ("--max-shard-size", max_shard_size)):
            if given:
                raise BevatronError(f"{option} has no meaning with --to peft; drop it")
        show(export_adapter(src, dst, dtype=dtype, overwrite=overwrite).to_dict(), as_json)
        return
    options: dict[str, Any] = {"dtype": dtype, "max_shard_size": max_shard_size}
    options |= {"overwrite": overwrite, "target_format": target_format}
    if dry_run:
        from bevatron.bridge.conversion_preview import preview_export

        seen = preview_export(src, dst, **options)
        print(json.dumps(seen.to_dict()) if as_json else seen.text())
        return
    report = export_checkpoint(src, dst, **options)
    show(report.to_dict(), as_json)


@app.command(rich_help_panel=CONVERT)
def verify(
    a: Annotated[str, typer.Argument(help="Native checkpoint, run or Hugging Face folder.")],
    b: Annotated[str, typer.Argument(help="The other one.")],
    logits: Annotated[bool, typer.Option("--logits/--no-logits")] = True,
    accept_field: AcceptField = None,
    as_json: Json = False,
) -> None:
    """Compare two models: every tensor by its hash, then logits. Status 0 only if they agree."""
    from bevatron.evaluate.verify import verify as compare

    report = compare(a, b, logits=logits, accept=accept_field or ())
    print(json.dumps(report.to_dict()) if as_json else report.text())
    if not report.ok:
        raise CheckFailed(f"{a} and {b} differ; see above")


@app.command(rich_help_panel=CONVERT)
def inspect(
    path: Annotated[
        str, typer.Argument(help="Hugging Face folder, native checkpoint, run or token store.")
    ],
    accept_field: AcceptField = None,
    as_json: Json = False,
) -> None:
    """Say what a model is: family, layers, bytes, dtype, step; or what a token store is."""
    if (Path(path) / "store.json").is_file():
        from bevatron.data.token_store import TokenStore

        show(TokenStore.open(Path(path)).describe(), as_json)
        return
    from bevatron.bridge.inspect import inspect as look

    show(look(path, accept_field or ()), as_json)


class _Merge(TyperCommand):
    """`--weights` takes all numbers that follow it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        out: list[str] = []
        taking = False
        for arg in args:
            taking = arg == "--weights" or (taking and _is_number(arg))
            out += [] if arg == "--weights" else ["--weights", arg] if taking else [arg]
        return super().parse_args(ctx, out)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@app.command(cls=_Merge, rich_help_panel=CONVERT)
def merge(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT... DST",
            help="Native checkpoints, runs or HF folders of one shape, or one run that trains an "
            "adapter; then the native checkpoint to make.",
        ),
    ],
    weights: Annotated[
        list[float] | None,
        typer.Option(
            metavar="W...", help="One for each, divided by their sum; default: all equal."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Average checkpoints of one shape: a weighted mean of every tensor, rounded once. Or merge an
    adapter into its model: RUN DST."""
    no_blas()
    from bevatron.bridge.merge import merge as make

    if len(paths) < 2:
        raise BevatronError("merge needs checkpoints and a target: CKPT... DST")
    *checkpoints, target = paths
    report = make(checkpoints, target, weights=weights or (), overwrite=overwrite)
    show(report.to_dict(), as_json)
