"""Verbs about alignment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bevatron.cli.app import (
    GENERATE,
    Device,
    Dtype,
    Json,
    Overrides,
    TensorParallel,
    app,
    rounded,
    show,
)


@app.command("pass-rates", rich_help_panel=GENERATE)
def pass_rates(
    config: Annotated[Path, typer.Argument(help="A run configuration with objective.rewards.")],
    overrides: Overrides = None,
    ckpt: Annotated[
        str | None, typer.Option(help="Whose answers; default: the configuration's model.init.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The rows with their pass_rate, to write as JSONL.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each problem.")] = 8,
    greedy: Annotated[bool, typer.Option("--greedy", help="One answer, at temperature 0.")] = False,
    validation: Annotated[
        bool, typer.Option("--validation", help="data.validation, rather than data.train.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Problems at most; default: one pass.")
    ] = None,
    tp: TensorParallel = 1,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure how often a model solves the problems of a run, for a curriculum or to compare
    checkpoints."""
    from bevatron.align.pass_rates import pass_rates as measure

    found = measure(
        config,
        list(overrides or ()),
        out,
        ckpt=ckpt,
        samples=1 if greedy else samples,
        greedy=greedy,
        validation=validation,
        limit=limit,
        tp=tp,
        dtype=dtype,
        device=device,
    )
    show(found if as_json else rounded(found), as_json)
