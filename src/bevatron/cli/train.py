"""Verbs around a training run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from bevatron.cli.app import CLUSTER, TRAIN, Json, Overrides, Overwrite, app, known, show, show_help
from bevatron.errors import BevatronError, CheckFailed

CONFIG_HELP = "A run configuration (YAML), or the name of a recipe."
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help=CONFIG_HELP)]


@app.command(rich_help_panel=TRAIN)
def tokenize(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC... DST",
            help="Text, .jsonl, .json, .csv, .parquet, .arrow, folders of them or saved by "
            "datasets, datasets (org/name[:config]); then target.",
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
    as_text: Annotated[
        list[str] | None, typer.Option(help="Files of this suffix are plain text, such as .json.")
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(help="Below folders, names to leave out, such as '*.zip'.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Of rows with messages, prompt and completion, or text: with what is to be "
            "learned of each, for objective sft.",
        ),
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="With --chat, a file in place of the tokenizer's own.")
    ] = None,
    learn_all: Annotated[
        bool, typer.Option("--learn-all", help="With --chat, prompts and questions as well.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn text into a memory-mapped token store. Killed, the same command goes on from there."""
    from bevatron.data.text_encoder import ENGINES
    from bevatron.data.tokenize import tokenize as make

    known("--engine", engine, *ENGINES)
    if len(paths) < 2:
        raise BevatronError("tokenize needs at least one source and a target: SRC... DST")
    *sources, target = paths
    if chat:
        from bevatron.data.tokenize_chats import tokenize_chats

        given = {"--text-field": text_field != "text", "--no-eos": not eos}
        given |= {"--as-text": bool(as_text), "--leave-out": bool(leave_out)}
        given["--engine"] = engine != "auto"
        if other := next((name for name, there in given.items() if there), None):
            raise BevatronError(f"{other} is for texts and means nothing with --chat; drop it")
        stored, notes = tokenize_chats(
            list(sources),
            Path(target),
            tokenizer=tokenizer,
            chat_template=chat_template,
            assistant_only=not learn_all,
            completion_only=not learn_all,
            split=split,
            workers=workers,
            overwrite=overwrite,
        )
        info = stored.info
        shown = {"path": target, "tokens": info.tokens, "documents": info.documents}
        show({**shown, "learned": info.learned, **notes}, as_json)
        return
    if chat_template is not None or learn_all:
        raise BevatronError("--chat-template and --learn-all are for rows of chats; add --chat")
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
        as_text=as_text or [],
        leave_out=leave_out or [],
    )
    info = store.info
    shown = {"path": target, "tokens": info.tokens, "documents": info.documents}
    show({**shown, "skipped": dict(info.skipped), "engine": dict(info.engine or {})}, as_json)


@app.command("tokenizer", rich_help_panel=TRAIN)
def tokenizer_(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT... DST", help="What `tokenize` takes as text; then the folder to make."
        ),
    ],
    vocab_size: Annotated[int, typer.Option(help="Tokens in all, special ones included.")],
    style: Annotated[
        str,
        typer.Option(help="nanochat: its special tokens and chat template; plain: GPT-4's split."),
    ] = "nanochat",
    max_characters: Annotated[
        int, typer.Option(min=1, help="No more text is read.")
    ] = 2_000_000_000,
    max_document: Annotated[
        int | None,
        typer.Option(min=1, help="No more characters of a document; NanoChat: 10000."),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    split: Annotated[
        str | None, typer.Option(help="Of a dataset (train); makes a folder be read as one.")
    ] = None,
    as_text: Annotated[
        list[str] | None, typer.Option(help="Files of this suffix are plain text, such as .json.")
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(help="Below folders, names to leave out, such as '*.zip'.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a byte-level BPE tokenizer on text; transformers and every verb here take the
    result."""
    from bevatron.data.tokenizer_training import STYLES, train_tokenizer

    known("--style", style, *STYLES)
    if len(paths) < 2:
        raise BevatronError("tokenizer needs at least one text and a target: TEXT... DST")
    *sources, target = paths
    made = train_tokenizer(
        list(sources),
        Path(target),
        vocab_size=vocab_size,
        style=style,
        max_characters=max_characters,
        max_document=max_document,
        overwrite=overwrite,
        text_field=text_field,
        split=split,
        as_text=as_text or [],
        leave_out=leave_out or [],
    )
    show(made.to_dict(), as_json)


ALLOW = "--allow-changed"
ALL = "all"


class _Train(TyperCommand):
    """`--allow-changed` alone is for all keys; names follow it, or stand behind a `=`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        out: list[str] = []
        for i, arg in enumerate(args):
            following = args[i + 1] if i + 1 < len(args) else ""
            named = arg == ALLOW and _are_keys(following)
            out.append(f"{ALLOW}={ALL}" if arg == ALLOW and not named else arg)
        return super().parse_args(ctx, out)


def _are_keys(text: str) -> bool:
    """Whether these are keys' names (perhaps misspelt), rather than a file's, a recipe's, an option
    or an override."""
    looks = re.fullmatch(r"[a-z_]\w*([.,][a-z_]\w*)*", text) is not None
    return looks and not text.endswith((".yaml", ".yml")) and not Path(text).exists()


@app.command(cls=_Train, rich_help_panel=TRAIN)
def train(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help=CONFIG_HELP)] = None,
    overrides: Overrides = None,
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
        int | None,
        typer.Option(min=1, help="With --dry-run: of how many processes; default: a recipe's own."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: one object.")] = False,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config",
            help="Print every key as CONFIG has it; without CONFIG, its default and meaning.",
        ),
    ] = False,
    allow_changed: Annotated[
        str | None,
        typer.Option(
            ALLOW,
            metavar="[KEY,...]",
            help="Go on although keys that decide the numbers changed: these, or all.",
        ),
    ] = None,
    reset_optimizer: Annotated[
        bool,
        typer.Option(
            "--reset-optimizer", help="Go on with the optimizer as before its first update."
        ),
    ] = False,
    reset_at: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train, or continue, by a run configuration; also under torchrun.

    SIGTERM, SIGUSR1 or Ctrl-C: save after this step and end, with status 128 + the signal's number.
    """
    from bevatron.recipes import find
    from bevatron.train.config_reference import known_keys
    from bevatron.train.launch import train as start
    from bevatron.train.processes_and_signals import ONE_NODE, Nodes

    if print_config:
        print(_printed(config, overrides or []), end="")
        return
    if config is None:
        raise BevatronError(
            "train needs a run configuration: `bevatron train CONFIG`; `bevatron train "
            "--print-config` prints one with every key to start from"
        )
    if nnodes > 1 and (nproc is None or rendezvous is None):
        raise BevatronError(f"--nnodes {nnodes} needs --nproc N and --rendezvous HOST:PORT")
    changed: bool | frozenset[str] = allow_changed == ALL
    if allow_changed is not None and allow_changed != ALL:
        changed = known_keys(allow_changed.split(","), ALLOW)
    start(
        find(config),
        overrides or [],
        nproc=nproc,
        nodes=Nodes(nnodes, rendezvous) if rendezvous is not None else ONE_NODE,
        max_restarts=max_restarts,
        dry_run=dry_run,
        paper_ranks=world,
        as_json=as_json,
        allow_changed=changed,
        reset_optimizer=reset_optimizer,
        reset_at=reset_at,
    )


def _printed(config: Path | None, overrides: list[str]) -> str:
    """What `--print-config` prints."""
    if config is None:
        from bevatron.train.config_reference import default_yaml

        return default_yaml()
    from bevatron.recipes import find
    from bevatron.train.config_file import load_config, to_yaml

    return to_yaml(load_config(find(config), overrides), absent=True)


@app.command(rich_help_panel=TRAIN)
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one; default: list all.")] = None,
    as_json: Json = False,
) -> None:
    """Run configurations that ship with Bevatron; `bevatron train NAME` runs one."""
    from bevatron.recipes import recipe, table
    from bevatron.recipes import recipes as every

    if name is None:
        rows = [one.to_dict() for one in every()]
        print(json.dumps(rows) if as_json else table(rows))
        return
    found = recipe(name)
    if as_json:
        more = {"commands": found.commands, "path": str(found.path), "text": found.text}
        print(json.dumps({**found.to_dict(), **more}))
    else:
        print(found.text, end="")


@app.command(rich_help_panel=TRAIN)
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


@app.command(rich_help_panel=CLUSTER)
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
app.add_typer(
    launcher,
    name="launch",
    help="Write what a cluster's scheduler runs: `bevatron launch slurm`.",
    rich_help_panel=CLUSTER,
)


@launcher.callback(invoke_without_command=True)
def _launcher(context: typer.Context) -> None:
    show_help(context)


@launcher.command()
def slurm(
    config: Config,
    overrides: Overrides = None,
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
    from bevatron.recipes import find
    from bevatron.train.slurm import script

    text = script(
        find(config),
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
