"""`bevatron train`: check everything that can be checked, then run, or start the processes that do.

The same command runs in one process, starts N of its own (`--nproc`), or is one of torchrun's.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bevatron.errors import BevatronError
from bevatron.parallel.layout import Layout, LayoutError, check
from bevatron.train.config import RunConfig, load_config, to_yaml

if TYPE_CHECKING:
    from bevatron.train.start import Start

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's own: where a worker leaves its last words


def train(
    config_path: Path,
    overrides: list[str],
    *,
    nproc: int | None = None,
    dry_run: bool = False,
    print_config: bool = False,
    allow_changed: bool = False,
) -> None:
    """Train by a run configuration.

    Args:
        overrides: `section.key=value`, parsed as YAML.
        nproc: processes to start on this machine; None under torchrun, or for one process.
    Raises BevatronError with one message, whichever rank failed.
    """
    config = load_config(config_path, overrides)
    if print_config:
        print(to_yaml(config), end="")
        return
    is_worker = "RANK" in os.environ
    world = nproc or int(os.environ.get("WORLD_SIZE", "1"))
    layout = layout_of(config, world)
    if not is_worker or dry_run:
        _check(config, layout)
    if dry_run:
        from bevatron.train.dry_run import report

        report(config, layout)
    elif nproc is not None and nproc > 1 and not is_worker:
        arguments = [str(config_path), *overrides]
        _launch(arguments + ["--allow-changed"] * allow_changed, nproc)
    elif is_worker:
        _work_and_report(config, layout, allow_changed)
    else:
        work(config, layout, allow_changed)


def layout_of(config: RunConfig, world: int) -> Layout:
    """The configured layout over `world` processes; `dp_shard` is what is left of them."""
    p = config.parallel
    others = p.pp * p.dp_replicate * p.cp * p.tp
    if p.dp_shard is None and world % others:
        raise LayoutError(
            f"{world} processes cannot be divided by pp {p.pp} x dp_replicate {p.dp_replicate} x "
            f"cp {p.cp} x tp {p.tp} = {others}; start a multiple of {others} (--nproc), or change "
            "parallel.*"
        )
    layout = Layout(
        pp=p.pp,
        dp_replicate=p.dp_replicate,
        dp_shard=p.dp_shard or world // others,
        cp=p.cp,
        tp=p.tp,
        sequence_parallel=p.sequence_parallel,
        schedule=p.schedule,
        split=tuple(p.split) if p.split is not None else None,
    )
    if layout.world_size != world:
        raise LayoutError(
            f"parallel.* needs {layout.world_size} processes ({layout}), there are {world}; start "
            f"them with --nproc {layout.world_size} or torchrun"
        )
    return layout


def _check(config: RunConfig, layout: Layout) -> None:
    """All that needs no process group: the start, the layout, the objective, the data."""
    from bevatron.data.store import TokenStore
    from bevatron.train.start import find_start

    start = find_start(config)
    _check_export(config, start)
    check(
        layout,
        start.spec,
        seq_len=config.data.seq_len,
        global_batch=config.train.global_batch,
        micro=config.train.micro_batch,
    )
    from bevatron.parallel.place import stage_ranges

    stage_ranges(start.spec, layout, config.data.seq_len)
    _objective(config)
    if start.spec.head.kind != "causal_lm":
        raise BevatronError(
            f"objective.name pretrain needs a model with a causal_lm head; this one has the head "
            f"{start.spec.head.kind}"
        )
    for source in [*config.data.train, *config.data.validation]:
        TokenStore.open(Path(source.path)).check_vocab(start.spec.vocab_size)


def _check_export(config: RunConfig, start: Start) -> None:
    """A run may not find out at its end that it cannot write there."""
    target = config.checkpoint.export
    done = start.weights.manifest.step if start.weights is not None and start.resumed else 0
    if target is not None and done < config.train.steps and os.path.lexists(target):
        raise BevatronError(
            f"checkpoint.export: {target} already exists; remove it, or name another folder"
        )


def _objective(config: RunConfig) -> Any:
    """The objective by its name."""
    from bevatron.train.objectives import Pretrain

    if config.objective.name != "pretrain":
        raise BevatronError(f"objective.name {config.objective.name!r} is unknown; known: pretrain")
    return Pretrain()


def work(config: RunConfig, layout: Layout, allow_changed: bool) -> None:
    """One rank's whole run."""
    from bevatron.parallel.agree import on_all
    from bevatron.parallel.world import default_device, world
    from bevatron.train.run import Run
    from bevatron.train.start import opened_run

    device = default_device()
    main = os.environ.get("RANK", "0") == "0"

    def say(text: str) -> None:
        if main:
            print(text, file=sys.stderr, flush=True)

    # FSDP2 warns that the embedding's output is a view: nothing here adds to it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    with world(device):
        with opened_run(config, say) as start:
            run = Run(config, start, layout, _objective(config), device, allow_changed)
            origin = start.resumed or config.model.init or f"random weights, {config.model.spec}"
            say(f"training {config.run.dir} at {layout} from {origin}, step {run.step}")
            run.go(say)
            if run.step:
                say(f"step {run.step} is in {run.folder.step_folder(run.step)}")
        if "RANK" in os.environ:
            # Leave together and without destructors: gloo's threads may outlive the interpreter's
            # teardown and abort a process whose work is done and saved.
            on_all(lambda: None)
            sys.stdout.flush()
            os._exit(0)


def _work_and_report(config: RunConfig, layout: Layout, allow_changed: bool) -> None:
    """As a worker: leave the message where the launcher finds it, and leave at once, so that the
    launcher stops the other ranks."""
    try:
        work(config, layout, allow_changed)
    except BaseException as error:
        expected = isinstance(error, BevatronError)
        message = str(error) if expected else traceback.format_exc()
        if (path := os.environ.get(ERROR_FILE)) is not None:
            extra = {"timestamp": str(int(time.time())), "py_callstack": message}
            content = {"message": {"message": message, "extraInfo": extra}}
            Path(path).write_text(json.dumps(content), encoding="utf-8")
        if os.environ.get("BEVATRON_LAUNCHER") is None:
            print(f"error: rank {os.environ['RANK']}: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2 if expected else 1)


def _launch(arguments: list[str], nproc: int) -> None:
    """Start `nproc` workers on this machine through torchrun's own launcher and wait for them."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    os.environ["BEVATRON_LAUNCHER"] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id="bevatron",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "bevatron", "train", *arguments)
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        said = first.message if isinstance(first.message, str) else first.message["message"]
        raise BevatronError(f"rank {rank}: {said}") from None
