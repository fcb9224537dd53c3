"""Verbs that talk to a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bevatron.cli.app import (
    GENERATE,
    OTHER,
    ChatTemplateFile,
    Checkpoint,
    Device,
    Dtype,
    Int8,
    Json,
    MinP,
    PipelineParallel,
    RepetitionPenalty,
    Temperature,
    TensorParallel,
    TopK,
    TopP,
    app,
    rounded,
    show,
)
from bevatron.errors import BevatronError


@app.command(rich_help_panel=GENERATE)
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
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Complete a prompt, or answer a chat: messages as JSON on standard input.

    Sampled as the model's generation_config.json says, unless flags say otherwise.
    """
    from bevatron.generate.prompts import read_prompts

    prompts = read_prompts(prompt, file, chat=chat, system=system)  # before torch is imported
    from bevatron.generate.generate_command import generate as complete

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
        device=device,
        dtype=dtype,
        as_json=as_json or file is not None,
    )


@app.command(rich_help_panel=GENERATE)
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
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Talk to a model in the terminal. /help in it lists its commands.

    Sampled as the model's generation_config.json says, unless flags say otherwise.
    """
    from bevatron.generate.chat_terminal import chat as talk

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
        device=device,
        dtype=dtype,
    )


@app.command(rich_help_panel=GENERATE)
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
    device: Device = None,
    dtype: Dtype = None,
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

    What a request does not say of sampling, the model's generation_config.json says.
    SIGTERM or Ctrl-C: refuse new requests, let running ones end, then end; twice: at once.
    """
    from bevatron.generate.server.serve_command import serve as start

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
        device=device,
        dtype=dtype,
        max_batch=max_batch,
        max_tokens=max_tokens,
        queue=queue,
    )


@app.command(
    "eval",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    rich_help_panel=GENERATE,
)
def eval_(
    context: typer.Context,
    ckpt: Checkpoint,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="DATA...", help="Token stores, text, .jsonl, .parquet, folders."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Of lm-evaluation-harness; all its other flags are passed on."),
    ] = None,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    dtype: Dtype = None,
    int8: Int8 = False,
    device: Device = None,
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
        from bevatron.evaluate.lm_eval_tasks import run_tasks

        for option, value in (("--data", data), ("--seq-len", seq_len), ("--stride", stride)):
            if value is not None:
                raise BevatronError(f"{option} has no meaning with --tasks; leave one of them out")
        limited = [] if limit is None else ["--limit", str(limit)]
        run_tasks(ckpt, tasks, model, [*limited, *context.args], device=device, as_json=as_json)
        return
    from bevatron.evaluate.perplexity import check_data, evaluate, open_engine

    unknown = [argument for argument in context.args if argument.startswith("-")]
    if unknown:
        raise BevatronError(
            f"eval has no option {unknown[0]}, and options of lm-evaluation-harness need "
            "--tasks; see `bevatron eval --help`"
        )
    paths = [*(data or ()), *context.args]
    check_data(paths)
    with open_engine(ckpt, **model, device=device) as engine:
        found = evaluate(
            engine,
            paths,
            seq_len=seq_len,
            stride=stride,
            limit=None if limit is None else int(limit),
        )
    show(found if as_json else rounded(found), as_json)


@app.command(
    "transformers",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
    rich_help_panel=OTHER,
)
def transformers_(context: typer.Context) -> None:
    """transformers' own command line, which knows Llama-Nemotron here: serve, chat and the rest."""
    from importlib.metadata import entry_points

    commands = list(entry_points(group="console_scripts", name="transformers"))
    if not commands:
        raise BevatronError("transformers is not installed; install bevatron[hf]")
    import bevatron.hf

    bevatron.hf.register()
    sys.argv = ["transformers", *context.args]
    commands[0].load()()
