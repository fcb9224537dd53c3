"""The command line. A verb's signature is its interface, its docstring the help."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import bevatron
from bevatron.errors import BevatronError, CheckFailed

app = typer.Typer(
    name="bevatron",
    help="From Hugging Face to a training cluster and back: convert, train in 3D, generate.",
    add_completion=False,
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
Checkpoint = Annotated[str, typer.Argument(help="Native checkpoint, run, HF folder or Hub id.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option(help="1 keeps all.")]
TopK = Annotated[int | None, typer.Option(help="0 keeps all.")]
MinP = Annotated[float | None, typer.Option(help="Share of the likeliest token's probability.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="1 is none.")]
ChatTemplateFile = Annotated[Path | None, typer.Option(help="Instead of the checkpoint's own.")]
TensorParallel = Annotated[int, typer.Option(min=1, help="Processes that share each layer.")]
PipelineParallel = Annotated[int, typer.Option(min=1, help="Processes that share the layers.")]
Int8 = Annotated[bool, typer.Option("--int8", help="8-bit weights, on CPUs.")]


def _version(show: bool) -> None:
    if show:
        print(f"bevatron {bevatron.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command("import")
def import_(
    src: Annotated[
        str, typer.Argument(help="A Hugging Face folder, Hub id or Nanotron checkpoint.")
    ],
    dst: Annotated[str, typer.Argument(help="The native checkpoint to make; a folder or a URL.")],
    dtype: Dtype = None,
    source_format: Annotated[str, typer.Option("--from", help="auto, hf or nanotron.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Convert a Hugging Face or Nanotron model into a native checkpoint."""
    _no_blas()
    from bevatron.bridge.convert import import_checkpoint

    _known("--from", source_format, "auto", "hf", "nanotron")
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "overwrite": overwrite}
    options["source_format"] = source_format
    if dry_run:
        from bevatron.bridge.preview import preview_import

        seen = preview_import(src, dst, **options)
        print(json.dumps(seen.to_dict()) if as_json else seen.text())
        return
    report = import_checkpoint(src, dst, **options)
    _show(report.to_dict(), as_json)


@app.command()
def export(
    src: Annotated[str, typer.Argument(help="A native checkpoint or a run; a folder or a URL.")],
    dst: Annotated[Path, typer.Argument(help="The folder to make.")],
    target_format: Annotated[str, typer.Option("--to", help="hf or nanotron.")] = "hf",
    dtype: Dtype = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Such as 5GB; default: the source's shards, else 5GB.")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Convert a native checkpoint or a run into a Hugging Face folder or a Nanotron checkpoint."""
    _no_blas()
    from bevatron.bridge.convert import export_checkpoint

    _known("--to", target_format, "hf", "nanotron")
    options: dict[str, Any] = {"dtype": dtype, "max_shard_size": max_shard_size}
    options |= {"overwrite": overwrite, "target_format": target_format}
    if dry_run:
        from bevatron.bridge.preview import preview_export

        seen = preview_export(src, dst, **options)
        print(json.dumps(seen.to_dict()) if as_json else seen.text())
        return
    report = export_checkpoint(src, dst, **options)
    _show(report.to_dict(), as_json)


@app.command()
def verify(
    a: Annotated[str, typer.Argument(help="Native checkpoint, run or Hugging Face folder.")],
    b: Annotated[str, typer.Argument(help="The other one.")],
    logits: Annotated[bool, typer.Option("--logits/--no-logits")] = True,
    as_json: Json = False,
) -> None:
    """Compare two models: every tensor by its hash, then logits. Status 0 only if they agree."""
    from bevatron.bridge.verify import verify as compare

    report = compare(a, b, logits=logits)
    print(json.dumps(report.to_dict()) if as_json else report.text())
    if not report.ok:
        raise CheckFailed(f"{a} and {b} differ; see above")


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(help="Hugging Face folder, native checkpoint, run or token store.")
    ],
    as_json: Json = False,
) -> None:
    """Say what a model is: family, layers, bytes, dtype, step; or what a token store is."""
    if (Path(path) / "store.json").is_file():
        from bevatron.data.store import TokenStore

        _show(TokenStore.open(Path(path)).describe(), as_json)
        return
    from bevatron.bridge.inspect import inspect as look

    _show(look(path), as_json)


@app.command()
def prune(
    ckpt: Checkpoint,
    dst: Annotated[str, typer.Argument(help="The native checkpoint to make; a folder or a URL.")],
    data: Annotated[Path | None, typer.Option(help="Token store to measure importance on.")] = None,
    scores: Annotated[
        Path | None, typer.Option(help="File of `bevatron importance`, instead of --data.")
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
    from bevatron.compress.options import parse_count, parse_layers, read_per_layer
    from bevatron.compress.prune import prune as make
    from bevatron.compress.sizes import Targets

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
    _show(report.to_dict(), as_json)


@app.command()
def tokenize(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC... DST",
            help="Text, .jsonl, .parquet, folders, datasets (org/name[:config]); then target.",
        ),
    ],
    tokenizer: Annotated[str, typer.Option(help="Folder with tokenizer.json, or Hub id.")],
    text_field: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    split: Annotated[
        str | None, typer.Option(help="Of a dataset (train); makes a folder be read as one.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default: one per core.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="auto, tiktoken or tokenizers; all give the same ids.")
    ] = "auto",
    overwrite: Overwrite = False,
    eos: Annotated[bool, typer.Option("--eos/--no-eos", help="End documents with eos.")] = True,
    as_json: Json = False,
) -> None:
    """Turn text into a memory-mapped token store. Killed, the same command goes on from there."""
    from bevatron.data.encoder import ENGINES
    from bevatron.data.tokenize import tokenize as make

    _known("--engine", engine, *ENGINES)
    if len(paths) < 2:
        raise BevatronError("tokenize needs at least one source and a target: SRC... DST")
    *sources, target = paths
    store = make(
        list(sources),
        Path(target),
        tokenizer=tokenizer,
        overwrite=overwrite,
        append_eos=eos,
        text_field=text_field,
        split=split,
        workers=workers,
        engine=engine,  # type: ignore[arg-type]  # checked above
    )
    info = store.info
    shown = {"path": target, "tokens": info.tokens, "documents": info.documents}
    _show({**shown, "skipped": dict(info.skipped), "engine": dict(info.engine or {})}, as_json)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A run configuration (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes to start here.")] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="With --nproc: restarts from the newest step on a failure.")
    ] = 0,
    nnodes: Annotated[
        int, typer.Option(min=1, help="Machines that start this command, each --nproc processes.")
    ] = 1,
    rendezvous: Annotated[
        str | None, typer.Option(help="With --nnodes: HOST:PORT on the first of them.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, say what each rank takes, start nothing.")
    ] = False,
    world: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: of how many processes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: one object.")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved configuration.")
    ] = False,
    allow_changed: Annotated[
        bool, typer.Option("--allow-changed", help="Resume although what decides numbers changed.")
    ] = False,
) -> None:
    """Train, or continue, by a run configuration; also under torchrun.

    SIGTERM, SIGUSR1 or Ctrl-C: save after this step and end, with status 128 + the signal's number.
    """
    from bevatron.train.launch import train as start
    from bevatron.train.workers import ONE_NODE, Nodes

    if nnodes > 1 and (nproc is None or rendezvous is None):
        raise BevatronError(f"--nnodes {nnodes} needs --nproc N and --rendezvous HOST:PORT")
    start(
        config,
        overrides or [],
        nproc=nproc,
        nodes=Nodes(nnodes, rendezvous) if rendezvous is not None else ONE_NODE,
        max_restarts=max_restarts,
        dry_run=dry_run,
        paper_ranks=world,
        as_json=as_json,
        print_config=print_config,
        allow_changed=allow_changed,
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    output: Annotated[
        Path | None, typer.Option(help="The page; default: report.html in the run, or here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """One HTML page about a run, or several side by side: curves, checkpoints, configuration."""
    from bevatron.train.report import report as write

    made = write(runs, output, as_json=as_json)
    print(json.dumps(made) if as_json else made)


@app.command()
def doctor(
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes to try; default: one per GPU, at least 2.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for them to exchange.")] = 120,
    as_json: Json = False,
) -> None:
    """Look at this machine and let processes exchange data; also under torchrun. Status 1 if they
    cannot."""
    from bevatron.train.doctor import doctor as look
    from bevatron.train.doctor import text

    report = look(nproc, timeout)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(report) if as_json else text(report))
    if not report["ok"]:
        raise CheckFailed("the processes could not exchange data; see above")


launcher = typer.Typer(add_completion=False, rich_markup_mode=None)
app.add_typer(launcher, name="launch", help="Write what a cluster's scheduler runs.")


@launcher.callback()
def _launcher() -> None:
    pass


@launcher.command()
def slurm(
    config: Annotated[Path, typer.Argument(help="A run configuration (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="0: on CPUs, with --nproc.")] = 8,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes per node; default: one per GPU.")
    ] = None,
    time: Annotated[str, typer.Option(help="The job's time limit.")] = "04:00:00",
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    job_name: Annotated[str, typer.Option()] = "bevatron",
    signal_before: Annotated[
        int, typer.Option(min=1, help="Seconds before the limit at which the run saves.")
    ] = 120,
    max_restarts: Annotated[int, typer.Option(min=0, help="On a failed process.")] = 3,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="A further option of sbatch, such as --exclusive.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write here instead of printing.")] = None,
) -> None:
    """Print a Slurm batch script for a run: it saves before the limit, requeues itself, goes on."""
    from bevatron.train.slurm import script

    text = script(
        config,
        overrides or [],
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        nproc=nproc,
        time=time,
        partition=partition,
        account=account,
        name=job_name,
        signal_before_s=signal_before,
        max_restarts=max_restarts,
        sbatch=sbatch or [],
    )
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")


@app.command(
    "transformers",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
def transformers_(context: typer.Context) -> None:
    """transformers' own command line, in which Llama-Nemotron models work: serve, chat, ..."""
    from importlib.metadata import entry_points

    commands = list(entry_points(group="console_scripts", name="transformers"))
    if not commands:
        raise BevatronError("transformers is not installed; install bevatron[hf]")
    import bevatron.hf

    bevatron.hf.register()
    sys.argv = ["transformers", *context.args]
    commands[0].load()()


@app.command()
def generate(
    ckpt: Checkpoint,
    prompt: Annotated[
        str | None,
        typer.Option(help="The text to complete; - reads it from standard input."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is what a user says in a chat.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System prompt; implies --chat.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Prompts or chats, one JSON value per line; JSON out.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="As OpenAI's.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="As OpenAI's.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answer.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Ends the answer and is left out; repeatable.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(min=0, help="With --json: of each token and the N likeliest.")
    ] = None,
    chat_template: ChatTemplateFile = None,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    int8: Int8 = False,
    as_json: Json = False,
) -> None:
    """Complete a prompt, or answer a chat: messages as JSON on standard input.

    Sampling is greedy; in a chat it is what the model's generation_config.json says.
    """
    from bevatron.generate.prompts import read_prompts

    prompts = read_prompts(prompt, file, chat=chat, system=system)  # before torch is imported
    from bevatron.generate.command import generate as complete

    complete(
        ckpt,
        prompts,
        chat_template=chat_template,
        max_new_tokens=max_new_tokens,
        stop=stop or [],
        logprobs=logprobs,
        asked={
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty,
            "seed": seed,
        },
        tp=tp,
        pp=pp,
        int8=int8,
        as_json=as_json or file is not None,
    )


@app.command()
def chat(
    ckpt: Checkpoint,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on with a saved conversation.")] = None,
    tools: Annotated[
        Path | None, typer.Option(help="JSON list of tools that the model may call.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 1024,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Annotated[int | None, typer.Option(help="Default: another one each time.")] = None,
    chat_template: ChatTemplateFile = None,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    int8: Int8 = False,
) -> None:
    """Talk to a model in the terminal. /help in it lists its commands."""
    from bevatron.generate.chat.terminal import chat as talk

    talk(
        ckpt,
        system=system,
        load=load,
        tools=tools,
        chat_template=chat_template,
        max_new_tokens=max_new_tokens,
        asked={
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        },
        tp=tp,
        pp=pp,
        int8=int8,
    )


@app.command("eval", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def eval_(
    context: typer.Context,
    ckpt: Annotated[str, typer.Argument(help="Native checkpoint, run, HF folder or Hub id.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="DATA...", help="Token stores, text, .jsonl, .parquet, folders."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Of lm-evaluation-harness; all its other flags are passed on."),
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline parallel.")] = 1,
    dtype: Dtype = None,
    int8: Annotated[bool, typer.Option("--int8", help="8-bit weights, on CPU.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; default: what is here.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens seen at once; default: 2048 or the model's context.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens that a window scores; default: all that it sees.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="Tokens of each of the data; examples of each task.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Loss, perplexity and bits per byte on tokens or text; with --tasks, any benchmark of
    lm-evaluation-harness."""
    if ckpt.startswith("-"):
        raise BevatronError(f"CKPT comes first: `bevatron eval CKPT {ckpt} ...`")
    model: dict[str, Any] = {"tp": tp, "pp": pp, "dtype": dtype, "int8": int8}
    if tasks is not None:
        from bevatron.evaluate.tasks import run_tasks

        for option, value in (("--data", data), ("--seq-len", seq_len), ("--stride", stride)):
            if value is not None:
                raise BevatronError(f"{option} has no meaning with --tasks; leave one of them out")
        limited = [] if limit is None else ["--limit", str(limit)]
        run_tasks(ckpt, tasks, model, [*limited, *context.args], device=device, as_json=as_json)
        return
    from bevatron.evaluate.opening import open_engine
    from bevatron.evaluate.perplexity import evaluate

    unknown = [argument for argument in context.args if argument.startswith("-")]
    if unknown:
        raise BevatronError(
            f"eval has no option {unknown[0]} of its own, and those of lm-evaluation-harness need "
            "--tasks; see `bevatron eval --help`"
        )
    with open_engine(ckpt, **model, device=device) as engine:
        found = evaluate(
            engine,
            [*(data or ()), *context.args],
            seq_len=seq_len,
            stride=stride,
            limit=None if limit is None else int(limit),
        )
    _show(found if as_json else _rounded(found), as_json)


@app.command()
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
    from bevatron.compress.command import importance as score

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
        show=lambda found: _show(found if as_json else _rounded(found), as_json),
    )


@app.command()
def demo(
    source: Annotated[str | None, typer.Argument(help="HF folder or Hub id to start from.")] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Everything goes in here.")] = Path("demo"),
    steps: Annotated[int, typer.Option(min=5, help="Training steps at each layout.")] = 50,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete --dir first.")] = False,
) -> None:
    """The whole tour on real text: convert, train in 3D, resume, export, verify, generate."""
    from bevatron.demo import demo as tour

    tour(source, folder, steps=steps, overwrite=overwrite)


@app.command()
def serve(
    ckpt: Annotated[str, typer.Argument(help="Native checkpoint, run, HF folder or Hub id.")],
    host: Annotated[str, typer.Option(help="0.0.0.0 opens it to others.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="BEVATRON_API_KEY", help="What clients have to show.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's, for clients; default: its folder's.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1)] = 1,
    pp: Annotated[int, typer.Option(min=1)] = 1,
    int8: Annotated[bool, typer.Option("--int8", help="8-bit weights, on CPUs.")] = False,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that run at once.")] = 32,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the KV cache holds in all.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get 429.")] = 128,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 8 << 20,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds in which a request must have arrived.")
    ] = 30.0,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that running answers get after SIGTERM.")
    ] = 30.0,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further Host header to answer to; * for any.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="Origin of web pages that may call; * for any.")
    ] = None,
) -> None:
    """Serve a model on this machine: OpenAI's API at /v1, a chat page at /.

    SIGTERM or Ctrl-C: refuse new requests, let running ones end, then end; twice: at once.
    """
    from bevatron.generate.server.command import serve as start

    start(
        ckpt,
        host=host,
        port=port,
        api_key=api_key,
        name=name,
        max_body=max_body,
        timeout_s=timeout,
        grace_s=grace,
        hosts=allow_host or [],
        origins=cors or [],
        tp=tp,
        pp=pp,
        int8=int8,
        max_batch=max_batch,
        max_tokens=max_tokens,
        queue=queue,
    )


def _known(option: str, value: str, *known: str) -> None:
    if value not in known:
        raise BevatronError(f"{option} {value}: not supported yet; use {', '.join(known)}")


def _no_blas() -> None:
    """numpy's BLAS reserves memory for every core when loaded; conversion multiplies nothing."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _show(values: dict[str, Any], as_json: bool) -> None:
    """One JSON object, or a line per key."""
    if as_json:
        print(json.dumps(values))
        return
    width = max(len(key) for key in values)
    for key, value in values.items():
        print(f"{key:<{width}}  {_plain(value)}")


def _rounded(value: Any) -> Any:
    """With as many digits as people read."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return "".join(f"\n  {_plain(v)}" for v in value) or "none"
    return "none" if value is None else str(value)


def main() -> None:
    """Run a verb; every failure is one message and a status, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may be any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False)
    except BevatronError as error:
        _fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", 2)
    except Exception as error:
        _fail(*_described(error))
    if status == 130:  # typer has caught the KeyboardInterrupt already
        _fail("interrupted", 130)
    sys.exit(status if isinstance(status, int) else 0)


def _described(error: Exception) -> tuple[str, int]:
    """Message and status of a usage error, or of one that should have been a BevatronError."""
    context = getattr(error, "ctx", None)
    if hasattr(error, "format_message"):  # typer's, wherever this version of it keeps the class
        hint = f" See `{context.command_path} --help`." if context is not None else ""
        return f"{error.format_message()}{hint}", 2
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"unexpected {type(error).__name__} at {where}: {first}", 2


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)
