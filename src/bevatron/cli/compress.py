"""Verbs that make a model smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bevatron.cli.app import (
    COMPRESS,
    Checkpoint,
    DryRun,
    Dtype,
    Json,
    Overrides,
    Overwrite,
    PipelineParallel,
    TensorParallel,
    app,
    rounded,
    show,
)


@app.command(rich_help_panel=COMPRESS)
def importance(
    ckpt: Checkpoint,
    out: Annotated[Path, typer.Argument(help="The scores to make, a safetensors file.")],
    data: Annotated[list[Path], typer.Option(help="Token store; may be given several times.")],
    samples: Annotated[int, typer.Option(min=1, help="How many to look at.")] = 1024,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one; default: 2048 or the context.")
    ] = None,
    aggregation: Annotated[
        str, typer.Option(help="Over samples and over the sequence: mean, l2 or var each.")
    ] = "l2,mean",
    layers: Annotated[
        str, typer.Option(help="bi, or also the loss without each layer (loss) or span (spans).")
    ] = "bi",
    span: Annotated[
        list[int] | None, typer.Option(min=1, help="Layers of a span; may be given several times.")
    ] = None,
    loss_samples: Annotated[int, typer.Option(min=1, help="Samples for losses.")] = 128,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    dp_shard: Annotated[
        int | None, typer.Option(min=1, help="Processes that share parameters; default: the rest.")
    ] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes to start here.")] = None,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of samples.")] = 0,
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
        samples=samples,
        seq_len=seq_len,
        aggregation=aggregation,
        layers=layers,
        spans=span or [],
        loss_samples=loss_samples,
        tp=tp,
        pp=pp,
        dp_shard=dp_shard,
        nproc=nproc,
        dtype=dtype,
        seed=seed,
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
def prune(
    ckpt: Checkpoint,
    dst: Annotated[str, typer.Argument(help="The native checkpoint to make; a folder or a URL.")],
    data: Annotated[Path | None, typer.Option(help="Token store to measure importance on.")] = None,
    scores: Annotated[
        Path | None, typer.Option(help="File of `bevatron importance`, instead of --data.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Sizes of this recipe (see `bevatron recipes`), or of a YAML file."),
    ] = None,
    hidden_size: Annotated[int | None, typer.Option()] = None,
    intermediate_size: Annotated[int | None, typer.Option()] = None,
    num_attention_heads: Annotated[
        int | None, typer.Option(help="Query heads; all KV heads stay.")
    ] = None,
    num_layers: Annotated[int | None, typer.Option(help="How many stay; see --depth-by.")] = None,
    drop_layers: Annotated[
        str | None, typer.Option(help="Which go, counted from 0, such as 15-30 or 3,5.")
    ] = None,
    depth_by: Annotated[
        str, typer.Option(help="influence, loss, or span (neighbours) decides which layers go.")
    ] = "influence",
    params: Annotated[
        str | None, typer.Option(help="Such as 4B: chooses the widths that are not given.")
    ] = None,
    per_layer: Annotated[
        Path | None, typer.Option(help="JSON: layer -> its sizes; the result's layers differ.")
    ] = None,
    multiple: Annotated[int, typer.Option(help="Of widths that --params chooses.")] = 64,
    merge_heads: Annotated[str, typer.Option(help="none, residual or sum.")] = "none",
    samples: Annotated[int, typer.Option(min=1, help="With --data.")] = 1024,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Prune a model in width and depth, by importance, into a smaller native checkpoint."""
    from bevatron.compress.prune import prune as make
    from bevatron.compress.prune_targets import parse_count, parse_layers, read_per_layer
    from bevatron.compress.pruned_spec import Targets
    from bevatron.recipes import sizes

    if recipe is not None:  # what is given here goes before what it says
        own = sizes(recipe)
        if hidden_size is None:
            hidden_size = own.hidden_size
        if intermediate_size is None:
            intermediate_size = own.intermediate_size
        if num_attention_heads is None:
            num_attention_heads = own.num_attention_heads
        if num_layers is None and drop_layers is None:
            num_layers, drop_layers = own.num_layers, own.drop_layers
    targets = Targets(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_attention_heads,
        num_layers=num_layers,
        drop_layers=parse_layers(drop_layers) if drop_layers is not None else (),
        parameters=parse_count(params) if params is not None else None,
        per_layer=read_per_layer(per_layer) if per_layer is not None else {},
        multiple=multiple,
        depth_by=depth_by,
    )
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
def search(
    ckpt: Checkpoint,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Of the search; the same command goes on in it.")
    ],
    params: Annotated[str, typer.Option(help="Of a candidate, such as 4B.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="section.key=value",
            help="Of the distillations' configuration, such as optimizer.lr=1e-4.",
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Token store for importance and distillation; may be given several times."
        ),
    ] = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option(help="Held-out token store, which decides; may be given several times."),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="File of `bevatron importance`; default: measured first.")
    ] = None,
    num_layers: Annotated[str | None, typer.Option(help="To try, such as 29,30,32.")] = None,
    num_attention_heads: Annotated[str | None, typer.Option(help="To try.")] = None,
    hidden_size: Annotated[str | None, typer.Option(help="To try, such as 3072,3584,4096.")] = None,
    intermediate_size: Annotated[str | None, typer.Option(help="To try.")] = None,
    within: Annotated[str, typer.Option(help="How far from --params.")] = "5%",
    multiple: Annotated[int, typer.Option(help="Of widths where none are given.")] = 64,
    depth_by: Annotated[
        str, typer.Option(help="influence, loss, or span (neighbours) decides which layers go.")
    ] = "influence",
    max_candidates: Annotated[int, typer.Option(min=1, help="The nearest to --params stay.")] = 18,
    samples: Annotated[int, typer.Option(min=1, help="For importance.")] = 1024,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one; default: 2048 or the context.")
    ] = None,
    val_samples: Annotated[int, typer.Option(min=1, help="Held-out ones per loss.")] = 128,
    steps: Annotated[
        int, typer.Option(min=0, help="Of the short distillation; 0: prune and compare only.")
    ] = 400,
    short: Annotated[int, typer.Option(min=1, help="How many candidates get it.")] = 8,
    long_steps: Annotated[
        int, typer.Option(min=0, help="Of a longer distillation, from the pruned weights again.")
    ] = 0,
    long: Annotated[int, typer.Option(min=1, help="How many candidates get it.")] = 2,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    dp_shard: Annotated[
        int | None, typer.Option(min=1, help="Processes that share parameters; default: the rest.")
    ] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes to start here.")] = None,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the weights of all candidates.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the candidates; a config.json is enough.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Search the architecture to prune to: compare all shapes near a parameter count by their loss
    after pruning, then after a short distillation. Killed, the same command goes on."""
    from bevatron.compress.prune_targets import parse_count, parse_share, parse_sizes
    from bevatron.compress.search.search_space import Axes, Goal

    axes = Axes(
        num_layers=parse_sizes("--num-layers", num_layers),
        num_attention_heads=parse_sizes("--num-attention-heads", num_attention_heads),
        hidden_size=parse_sizes("--hidden-size", hidden_size),
        intermediate_size=parse_sizes("--intermediate-size", intermediate_size),
    )
    share = parse_share("--within", within)
    goal = Goal(parse_count(params), share, multiple, depth_by, max_candidates)
    if dry_run:
        from bevatron.compress.search.search_preview import dry_run as plan

        stages = {"steps": steps, "short": short, "long_steps": long_steps, "long": long}
        found = plan(ckpt, axes, goal, scores=scores, **stages)
    else:
        from bevatron.compress.search.search import Search
        from bevatron.compress.search.search_request import Options

        options = Options(
            axes,
            goal,
            tuple(data or ()),
            tuple(validation or ()),
            scores=scores,
            samples=samples,
            seq_len=seq_len,
            val_samples=val_samples,
            steps=steps,
            short=short,
            long_steps=long_steps,
            long=long,
            overrides=tuple(overrides or ()),
            dtype=dtype,
            seed=seed,
            keep=keep,
            tp=tp,
            pp=pp,
            dp_shard=dp_shard,
            nproc=nproc,
        )
        found = Search(ckpt, folder, options).run().found
    if as_json:
        show(found, True)
    else:
        from bevatron.compress.search.search_table import print_table

        print_table(found, folder)
