"""`bevatron train`: check everything that can be checked, then run, or start the processes that do.

The same command runs in one process, starts N of its own (`--nproc`), or is one of torchrun's.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bevatron.errors import BevatronError
from bevatron.parallel.layout import Layout, LayoutError, check
from bevatron.train.config import RunConfig, load_config, to_yaml
from bevatron.train.stopping import Stopping, end_with_parent
from bevatron.train.workers import ONE_NODE, Nodes, launch, reporting, say_stopped

if TYPE_CHECKING:
    import torch


def train(
    config_path: Path,
    overrides: list[str],
    *,
    nproc: int | None = None,
    nodes: Nodes = ONE_NODE,
    max_restarts: int = 0,
    dry_run: bool = False,
    print_config: bool = False,
    allow_changed: bool = False,
) -> None:
    """Train by a run configuration.

    Args:
        overrides: `section.key=value`, parsed as YAML.
        nproc: processes to start on this machine; None under torchrun, or for one process.
        nodes: of how many machines this is one, when this command is started on all of them.
        max_restarts: how often all processes are started anew, from the newest saved step, after
            one of them failed.
    Raises BevatronError with one message, whichever rank failed. A run that a signal ended raises
    SystemExit with 128 + the signal's number.
    """
    config = load_config(config_path, overrides)
    if print_config:
        print(to_yaml(config), end="")
        return
    is_worker = "RANK" in os.environ
    world = nproc * nodes.count if nproc else int(os.environ.get("WORLD_SIZE", "1"))
    layout = layout_of(config, world)
    if not is_worker or dry_run:
        _check(config, layout)
    if dry_run:
        from bevatron.train.dry_run import report

        report(config, layout)
    elif not is_worker and nproc is not None and (nproc > 1 or nodes.count > 1 or max_restarts):
        arguments = ["train", str(config_path), *overrides]
        arguments += ["--allow-changed"] * allow_changed
        launch(arguments, nproc, nodes=nodes, restarts=max_restarts)
    else:
        work(config, layout, allow_changed)


def prepared(config_path: Path, overrides: list[str], world: int) -> tuple[RunConfig, Layout]:
    """A configuration that can run on `world` processes, as far as that is known before."""
    config = load_config(config_path, overrides)
    layout = layout_of(config, world)
    _check(config, layout)
    return config, layout


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


def _objective(config: RunConfig) -> Any:
    """The objective by its name."""
    from bevatron.train.objectives import Pretrain

    if config.objective.name != "pretrain":
        raise BevatronError(f"objective.name {config.objective.name!r} is unknown; known: pretrain")
    return Pretrain()


def work(config: RunConfig, layout: Layout, allow_changed: bool) -> None:
    """One rank's whole run. A worker of a launcher leaves its last words and ends."""
    if worker := "RANK" in os.environ:
        end_with_parent()
    # FSDP2 warns that the embedding's output is a view: nothing here adds to it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    from bevatron.parallel.agree import on_all
    from bevatron.parallel.world import default_device, world

    device = default_device()
    # Whoever hangs is named before its collectives give up.
    timeout_s = 2 * config.safety.hang_timeout_s + 600
    # Reports twice: of what fails inside the group before an end of the group that might hang.
    with (
        Stopping() as stopping,
        reporting(worker, stopping),
        world(device, timeout_s),
        reporting(worker, stopping),
    ):
        _run(config, layout, allow_changed, device, stopping)
        if worker:
            # Leave together and without destructors: gloo's threads may outlive the interpreter's
            # teardown and abort a process whose work is done and saved.
            on_all(lambda: None)
            sys.stdout.flush()
            os._exit(0)
    if stopping.asked is not None:
        raise SystemExit(128 + stopping.asked)


def _run(
    config: RunConfig,
    layout: Layout,
    allow_changed: bool,
    device: torch.device,
    stopping: Stopping,
) -> None:
    """Inside the process group."""
    import torch.distributed as dist

    from bevatron.parallel.world import job_store
    from bevatron.train.run import Run
    from bevatron.train.start import find_start
    from bevatron.train.watch import Watch

    def say(text: str) -> None:
        if dist.get_rank() == 0:
            print(text, file=sys.stderr, flush=True)

    timeout_s, store = config.safety.hang_timeout_s, None
    if timeout_s and dist.get_world_size() > 1:
        store = job_store(min(timeout_s, 30.0))
    with Watch(timeout_s, dist.get_rank(), dist.get_world_size(), store) as watch:
        start = find_start(config)
        run = Run(config, start, layout, _objective(config), device, allow_changed, stopping, watch)
        if restarts := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            say(f"restart {restarts}: a process had failed")
        origin = start.resumed or config.model.init or f"random weights, {config.model.spec}"
        say(f"training {config.run.dir} at {layout} from {origin}, step {run.step}")
        run.go(say)
        if run.stopped:
            say_stopped()
        if run.step:
            say(f"step {run.step} is in {run.folder.step_folder(run.step)}")
