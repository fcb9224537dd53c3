"""Verbs that make a model smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bevatron.cli.app import (
    COMPRESS,
    Checkpoint,
    DryRun,
    Json,
    Overrides,
    Overwrite,
    app,
    rounded,
    show,
)
from bevatron.cli.dataclass_options import with_options
from bevatron.compress.prune_targets import Targets
from bevatron.compress.verb_options import Measuring, Processes, SearchOptions


@app.command(rich_help_panel=COMPRESS)
@with_options
def importance(
    ckpt: Checkpoint,
    out: Annotated[Path, typer.Argument(help="The scores to make, a safetensors file.")],
    data: Annotated[list[Path], typer.Option(help="Token store; may be given several times.")],
    measuring: Measuring,
    processes: Processes,
    html: Annotated[Path | None, typer.Option(help="Also draw a page of the scores.")] = None,
    as_json: Json = False,
) -> None:
    """Score heads, neurons, channels and layers on calibration text, for pruning; also under
    torchrun."""
    from bevatron.compress.importance_command import importance as score

    score(
        ckpt,
        out,
        data,
        measuring,
        processes,
        html=html,
        as_json=as_json,
        show=lambda found: show(found if as_json else rounded(found), as_json),
    )


@app.command(rich_help_panel=COMPRESS)
def logits(
    teacher: Checkpoint,
    config: Annotated[Path, typer.Argument(help="A run configuration with objective.logits.")],
    overrides: Overrides = None,
    dtype: Annotated[str, typer.Option(help="Of the log-probabilities: fp16 or fp32.")] = "fp16",
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes to start here.")] = None,
    as_json: Json = False,
) -> None:
    """Store a teacher's likeliest next tokens for the samples of a run, which then distils without
    the teacher; also under torchrun. Stopped, the same command goes on from there."""
    from bevatron.compress.store_logits import logits as make

    make(
        teacher,
        config,
        overrides or [],
        dtype=dtype,
        nproc=nproc,
        as_json=as_json,
        show=lambda found: show(found if as_json else rounded(found), as_json),
    )


@app.command(rich_help_panel=COMPRESS)
@with_options
def prune(
    ckpt: Checkpoint,
    dst: Annotated[str, typer.Argument(help="The native checkpoint to make; a folder or a URL.")],
    targets: Targets,
    data: Annotated[Path | None, typer.Option(help="Token store to measure importance on.")] = None,
    scores: Annotated[
        Path | None, typer.Option(help="File of `bevatron importance`, instead of --data.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Sizes of this recipe (see `bevatron recipes`), or of a YAML file."),
    ] = None,
    merge_heads: Annotated[str, typer.Option(help="none, residual or sum.")] = "none",
    samples: Annotated[int, typer.Option(min=1, help="With --data.")] = 1024,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Prune a model in width and depth, by importance, into a smaller native checkpoint."""
    from bevatron.compress.prune import prune as make
    from bevatron.recipes import sizes

    if recipe is not None:  # what is given here goes before what it says
        targets = targets.or_else(sizes(recipe).model_dump())
    report = make(
        ckpt,
        dst,
        targets,
        data=data,
        scores=scores,
        samples=samples,
        merge_heads=merge_heads,
        dry_run=dry_run,
        overwrite=overwrite,
    )
    show(report.to_dict(), as_json)


@app.command(rich_help_panel=COMPRESS)
@with_options
def search(
    ckpt: Checkpoint,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Of the search; the same command goes on in it.")
    ],
    options: SearchOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the candidates; a config.json is enough.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Search the architecture to prune to: compare all shapes near a parameter count by their loss
    after pruning, then after a short distillation. Killed, the same command goes on."""
    if dry_run:
        from bevatron.compress.search.search_request import dry_run as plan

        found = plan(ckpt, options)
    else:
        from bevatron.compress.search.search import Search

        found = Search(ckpt, folder, options).run().found
    if as_json:
        show(found, True)
    else:
        from bevatron.compress.search.search_results import print_table

        print_table(found, folder)
