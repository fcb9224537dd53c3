"""`bevatron train`: it checks everything that it can, then trains or starts processes that do.

The command trains in its own process, starts N processes (`--nproc`), or is itself one of the
processes that torchrun started.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bevatron.errors import BevatronError
from bevatron.parallel.layout import Layout, LayoutError, check, check_documents
from bevatron.train.config import RunConfig
from bevatron.train.config_file import load_config
from bevatron.train.config_objective import TOKENS
from bevatron.train.missing_inputs import check_present, stand_in
from bevatron.train.processes_and_signals import (
    ONE_NODE,
    Nodes,
    Stopping,
    launch,
    one_rank,
    say_stopped,
)

if TYPE_CHECKING:
    import torch

    from bevatron.train.objectives import Objective
    from bevatron.train.run_start import Start


def train(
    config_path: Path,
    overrides: list[str],
    *,
    nproc: int | None = None,
    nodes: Nodes = ONE_NODE,
    max_restarts: int = 0,
    dry_run: bool = False,
    paper_ranks: int | None = None,
    as_json: bool = False,
    allow_changed: bool | frozenset[str] = False,
    reset_optimizer: bool = False,
    reset_at: int | None = None,
) -> None:
    """Train by a run configuration.

    Args:
        overrides: `section.key=value`, parsed as YAML.
        nproc: processes to start on this machine; None under torchrun, or for one process.
        nodes: of how many machines this is one, when this command is started on all of them.
        max_restarts: how often all processes are started anew, from the newest saved step, after
            one of them failed.
        dry_run: build every stage on paper and print what it takes (as JSON if `as_json`).
        paper_ranks: of how many processes a dry run is; default: as many as would start, or as a
            recipe has it.
        allow_changed: what may change since the step that is continued from although it moves the
            numbers: nothing, everything, or these keys and sections.
        reset_optimizer: go on with the optimizer as before its first update.
        reset_at: the same unless the run goes on from a later step than this: for workers, which
            may be started again.
    Raises BevatronError with one message, whichever rank failed. A run that a signal ended raises
    SystemExit with 128 + the signal's number.
    """
    config = load_config(config_path, overrides)
    is_worker = "RANK" in os.environ
    if (paper_ranks is not None or as_json) and not dry_run:
        raise BevatronError("--world and --json go with --dry-run")
    here = nproc * nodes.count if nproc else int(os.environ.get("WORLD_SIZE", "1"))
    if dry_run and not is_worker and nproc is None and config.recipe is not None:
        here = config.recipe.world
    if not dry_run and not is_worker:
        check_present(config)
    world = paper_ranks or here
    layout = layout_of(config, world)
    if dry_run:
        _plan(config, layout, as_json)
        return
    start = None if is_worker else _check(config, layout)
    if reset_optimizer and reset_at is None:
        reset_at = _reset_step(config, start)
    if not is_worker and nproc is not None and (nproc > 1 or nodes.count > 1 or max_restarts):
        arguments = ["train", str(config_path), *overrides]
        if reset_at is not None:
            arguments.append(f"--reset-at={reset_at}")
        if allow_changed:
            names = "" if allow_changed is True else "=" + ",".join(sorted(allow_changed))
            arguments.append(f"--allow-changed{names}")
        launch(arguments, nproc, nodes=nodes, restarts=max_restarts)
    else:
        work(config, layout, allow_changed, reset_at)


def prepared(config_path: Path, overrides: list[str], world: int) -> tuple[RunConfig, Layout]:
    """A configuration that can run on `world` processes, as far as that is known before."""
    config = load_config(config_path, overrides)
    check_present(config)
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
        virtual_stages=p.virtual_stages,
        shard=p.shard,
    )
    if layout.world_size != world:
        raise LayoutError(
            f"parallel.* needs {layout.world_size} processes ({layout}), there are {world}; start "
            f"them with --nproc {layout.world_size} or torchrun"
        )
    return layout


def _plan(config: RunConfig, layout: Layout, as_json: bool) -> None:
    """Print what the run would be. It is planned before there is data, and before there are weights
    whose sizes are known: what does not exist yet is a warning, what is not whole an error."""
    absent: list[str] = []
    init, (config, notes) = config.model.init, stand_in(config)
    start = _check(config, layout, absent)
    from bevatron.train.dry_run import make_plan, to_text

    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    how = "; make it with `bevatron tokenize`" if config.objective.reads == TOKENS else ""
    notes += [f"{path}: does not exist{how}" for path in absent]
    objective = config.objective.make(start.spec, config)
    notes += _beyond_contexts(config, start, objective)
    plan = make_plan(config, layout, objective, notes)
    if init is not None and config.model.init is None:
        plan = replace(plan, start=f"{init}, which is not there yet")
    print(json.dumps(plan.to_dict()) if as_json else to_text(plan))


def _check(config: RunConfig, layout: Layout, absent: list[str] | None = None) -> Start:
    """All that needs no process group: the start, the layout, the objective, the data. Data that
    does not exist is noted in `absent` if it is given."""
    from bevatron.train.run_start import find_start
    from bevatron.train.trackers import check_trackers

    check_trackers(config.log)
    start = find_start(config)
    _check_export(config, start)
    check(
        layout,
        start.spec,
        seq_len=config.data.seq_len,
        global_batch=config.train.global_batch,
        micro=config.train.micro_batch,
        recompute=config.train.recompute,
        compiled=config.train.compile,
    )
    if config.data.document_mask:
        check_documents(start.spec, config.data.seq_len)
    objective = config.objective.make(start.spec, config)
    _check_companions(config, layout, start, objective)
    from bevatron.parallel.stage_split import stage_ranges
    from bevatron.train.freezing import frozen_parameters

    frozen_parameters(start.spec, config.train.freeze)

    stage_ranges(
        start.spec,
        layout,
        config.data.seq_len,
        micro_batch=config.train.micro_batch * objective.rows,
        recompute=config.train.recompute,
    )
    if absent is not None:
        sources = [*config.data.train, *config.data.validation]
        absent += [s.path for s in sources if not os.path.lexists(s.path)]
    if not absent:
        config.objective.feed.check(config, start)
    return start


def _check_companions(
    config: RunConfig, layout: Layout, start: Start, objective: Objective
) -> None:
    """The frozen models that the objective brings must run at the layout and read the same ids;
    what one of them said before must be of this run's samples."""
    from bevatron.data.tokenizer import TOKENIZER
    from bevatron.train.token_feed import check_companion, own_tokenizer

    own = None if config.data.allow_other_tokenizer else own_tokenizer(config, start)
    if objective.stored is not None:
        try:
            objective.stored.check(config)
        except BevatronError as error:
            raise BevatronError(f"objective.{objective.stored.key}: {error}") from None
    for name, companion in objective.companions.items():
        try:
            check(
                layout,
                companion.spec,
                seq_len=config.data.seq_len,
                global_batch=config.train.global_batch,
                micro=config.train.micro_batch,
                trained=False,
            )
            if config.data.document_mask:
                check_documents(companion.spec, config.data.seq_len)
        except LayoutError as error:
            raise LayoutError(f"objective.{name}: {error}") from None
        source = companion.weights.source if companion.weights is not None else None
        if not companion.of_batches:  # it has token ids of its own
            continue
        if own is not None and source is not None and (source / TOKENIZER).is_file():
            check_companion(f"objective.{name}", source, own)


def _beyond_contexts(config: RunConfig, start: Start, objective: Objective) -> list[str]:
    """A line for each model whose context is shorter than the samples."""
    from bevatron.train.model_override import beyond_context

    specs = {"the model": start.spec}
    specs |= {f"objective.{name}": c.spec for name, c in objective.companions.items()}
    lines = (beyond_context(spec, config.data, name) for name, spec in specs.items())
    return [line for line in lines if line is not None]


def _check_export(config: RunConfig, start: Start) -> None:
    """A run may not find out at its end that it cannot write there."""
    target = config.checkpoint.export
    done = start.weights.manifest.step if start.weights is not None and start.resumed else 0
    if target is not None and done < config.train.steps and os.path.lexists(target):
        raise BevatronError(
            f"checkpoint.export: {target} already exists; remove it, or name another folder"
        )


def _reset_step(config: RunConfig, start: Start | None) -> int:
    """The step at which the optimizer is reset: where the run goes on. A worker of another launcher
    that starts it again (`start` is None) finds in the step whether that has been done."""
    if start is None:
        from bevatron.checkpoint.run_folder import read_state
        from bevatron.train.run_start import find_start

        found = find_start(config)
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and found.resumed is not None:
            assert found.weights is not None
            state = read_state(found.resumed, found.weights.manifest.step)
            return 0 if state.get("optimizer_since") else sys.maxsize
        start = found
    if start.resumed is None or start.weights is None:
        raise BevatronError(
            "--reset-optimizer: there is no step to go on from, so there is nothing to reset"
        )
    return start.weights.manifest.step


def work(
    config: RunConfig,
    layout: Layout,
    allow_changed: bool | frozenset[str] = False,
    reset_at: int | None = None,
) -> None:
    """One rank's whole run. A worker of a launcher leaves its last words and ends."""
    worker = "RANK" in os.environ
    # Whoever hangs is named before its collectives give up.
    timeout_s = 2 * config.safety.hang_timeout_s + 600
    with (
        Stopping() as stopping,
        one_rank(worker, config.train.device, timeout_s, stopping) as device,
    ):
        _run(config, layout, allow_changed, reset_at, device, stopping)
    if stopping.asked is not None:
        raise SystemExit(128 + stopping.asked)


def _run(
    config: RunConfig,
    layout: Layout,
    allow_changed: bool | frozenset[str],
    reset_at: int | None,
    device: torch.device,
    stopping: Stopping,
) -> None:
    """Inside the process group."""
    import torch.distributed as dist

    from bevatron.parallel.on_all_ranks import on_all
    from bevatron.parallel.process_groups import job_store
    from bevatron.spec.count import describe_adapter
    from bevatron.train.config import depth_lines
    from bevatron.train.hang_watch import Watch
    from bevatron.train.hardware import why_on_cpu
    from bevatron.train.run_start import opened_run
    from bevatron.train.training_loop import Run

    def say(text: str) -> None:
        if dist.get_rank() == 0:
            print(text, file=sys.stderr, flush=True)

    timeout_s, store = config.safety.hang_timeout_s, None
    if timeout_s and dist.get_world_size() > 1:
        store = job_store(min(timeout_s, 30.0))
    with (
        Watch(timeout_s, dist.get_rank(), dist.get_world_size(), store) as watch,
        opened_run(config, say) as start,
    ):
        made: list[Objective] = []
        on_all(lambda: made.append(config.objective.make(start.spec, config)))
        objective = made[0]
        run = Run(
            config,
            start,
            layout,
            objective,
            device,
            stopping,
            watch,
            allowed=allow_changed,
            reset_at=reset_at,
        )
        if restarts := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            say(f"restart {restarts}: a process had failed")
        origin = start.resumed or config.model.init or f"random weights, {config.model.spec}"
        say(f"training {config.run.dir} at {layout} from {origin}, step {run.step}")
        if start.resumed is None and start.weights is not None and start.weights.of_a_run:
            say(
                f"{origin} is a step of a run, of which the weights are taken as an export would "
                "have them; run.branch_from goes on from it, with optimizer, fp32 masters and data"
            )
        if start.resumed is None:
            for line in depth_lines(config):
                say(line)
        if start.spec.adapter is not None:
            say(f"adapter: {describe_adapter(start.spec)}")
        if config.train.device is None and (why := why_on_cpu()) is not None:
            say(f"on the CPU: {why}")
        for line in _beyond_contexts(config, start, objective):
            say(line)
        run.go(say)
        if run.stopped:
            say_stopped()
        if run.step:
            say(f"step {run.step} is in {run.folder.step_folder(run.step)}")
