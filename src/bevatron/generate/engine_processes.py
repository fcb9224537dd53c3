"""The processes that share a model: this one is rank 0; it starts the others and directs them.

A worker loads its part of the model, reports through a store that it is ready, joins the process
group, and then computes what rank 0 commands. A worker that fails writes its error to a file and
ends. A thread of rank 0 notices this and ends the other workers, so that nothing waits for them any
more. All workers end with this process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from bevatron.bridge.open_weights import Opened, open_weights
from bevatron.checkpoint.new_folder import replace_text
from bevatron.errors import BevatronError, failed, failure
from bevatron.generate.decoding_model import Model
from bevatron.generate.decoding_weights import ModelWeights, Share, read_weights
from bevatron.generate.engine_ranks import LONG, Ranks, share_world
from bevatron.generate.engine_step import Output, Step
from bevatron.generate.request import NoRoom
from bevatron.parallel.layout import Layout, check
from bevatron.parallel.on_all_ranks import on_all
from bevatron.parallel.process_groups import join_world
from bevatron.parallel.stage_split import stage_ranges
from bevatron.spec import ModelSpec

START_S = 600.0  # for a worker to read its weights
GRACE_S = 5.0  # for the workers to end, or to say why they did


@dataclass(frozen=True)
class Plan:
    """What a worker is told."""

    ckpt: str
    tp: int
    pp: int
    device: str
    dtype: str | None
    int8: bool
    batches: bool
    last_words: str = ""

    def where(self, rank: int) -> torch.device:
        device = torch.device(self.device)
        if device.type == "cpu" or self.tp * self.pp == 1:
            return device
        return torch.device(device.type, rank % torch.accelerator.device_count())

    def read(self, opened: Opened, rank: int) -> ModelWeights:
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        return read_weights(
            opened,
            share_of(opened.spec, self.tp, self.pp, rank),
            dtype,
            self.where(rank),
            batches=self.batches,
            int8=self.int8,
            show=rank == 0,
        )


def check_layout(spec: ModelSpec, name: str, tp: int, pp: int) -> None:
    """Raise BevatronError if the model `name` cannot generate text, LayoutError if it cannot be cut
    so."""
    if spec.head.kind != "causal_lm":
        raise BevatronError(
            f"{name}: has the head {spec.head.kind}; only a model with a causal_lm head can "
            "generate text"
        )
    layout = Layout(pp=pp, tp=tp, sequence_parallel=False)
    check(layout, spec, seq_len=1, global_batch=pp, micro=1)


def share_of(spec: ModelSpec, tp: int, pp: int, rank: int) -> Share:
    """The part of a model that one of tp * pp ranks has."""
    stage, tp_rank = divmod(rank, tp)
    layout = Layout(pp=pp, tp=tp, sequence_parallel=False)
    stages = stage_ranges(spec, layout, 1, micro_batch=1, recompute="none")
    return Share(stages[stage], stage == 0, stage == pp - 1, tp, tp_rank)


def lost_another(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone, whose own words are to be read."""
    said = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo/" in said or "Connection" in said)
    )


class Group:
    """One process.

    Attributes:
        alone: whether no other process waits in the middle of a step, so that one may fail.
        error: what ended it, if it failed.
    """

    alone = True

    def __init__(self, model: Model) -> None:
        self.model = model
        self.error: BaseException | None = None

    def run(self, step: Step) -> Output:
        """Compute a step on all ranks."""
        output = self.model.run(step)
        assert output is not None
        return output

    def why(self, error: BaseException) -> str | None:
        """The cause of the error that ends it, if it is that another process failed."""
        self.error = error
        return None

    def close(self) -> None:
        """End all other processes."""


def open_group(
    opened: Opened,
    ckpt: str,
    tp: int,
    pp: int,
    device: torch.device,
    dtype: torch.dtype | None,
    int8: bool,
    batches: bool,
) -> Group:
    """Load a model over tp * pp processes.

    Raises LayoutError if it cannot be cut so, BevatronError with the message of a process that
    could not load its part."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    plan = Plan(ckpt, tp, pp, str(device), name, int8, batches)
    if int8 and device.type != "cpu":
        raise BevatronError(f"int8 is for CPUs, the device is {device}; leave it out")
    if tp * pp == 1:
        return Group(Model(opened.spec, plan.read(opened, 0), Ranks(), device))
    if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) == tp * pp:
        return _join_torchrun(opened, plan)
    if dist.is_initialized():
        raise BevatronError(
            f"tp {tp} x pp {pp} needs a process group of its own, this process has one already; "
            "open the engine in another process, or start as many processes with torchrun"
        )
    return WorkerGroup(opened, plan)


class LeadingGroup(Group):
    """Rank 0 of processes that follow it."""

    alone = False

    def run(self, step: Step) -> Output:
        self.model.ranks.command(step.to_bytes())
        return super().run(step)

    def close(self) -> None:
        if self.error is not None:  # the others may be anywhere in a step
            self.model.ranks.abandon()
            return
        with suppress(RuntimeError):
            self.model.ranks.command(b"")


class WorkerGroup(LeadingGroup):
    """This process and the workers that it starts."""

    def __init__(self, opened: Opened, plan: Plan) -> None:
        self.ranks: Ranks | None = None
        self.failed: BevatronError | None = None
        self.ending = False
        self.folder = tempfile.TemporaryDirectory(prefix="bevatron-")
        plan = Plan(**{**asdict(plan), "last_words": self.folder.name})
        world = plan.tp * plan.pp
        store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        self.workers = [_start(plan, rank, store.port) for rank in range(1, world)]
        try:
            weights = plan.read(opened, 0)
            self._wait_until_ready(store)
            with _loopback():
                _init(plan, store, 0, world)
                self.ranks = _all_ranks(plan)
        except BaseException as error:
            if not isinstance(error, BevatronError):
                self.why(error)
            self.close()
            if self.failed is not None:
                raise self.failed from None
            raise
        super().__init__(Model(opened.spec, weights, self.ranks, plan.where(0)))
        self.watch = threading.Thread(target=self._watch, name="bevatron-watch", daemon=True)
        self.watch.start()

    def _wait_until_ready(self, store: TCPStore) -> None:
        keys = [f"ready/{rank}" for rank in range(1, len(self.workers) + 1)]
        until = time.monotonic() + START_S
        while not store.check(keys):
            if (problem := self._ended()) is not None:
                raise problem
            if time.monotonic() > until:
                raise BevatronError(f"a worker was not ready within {START_S:.0f} s")
            time.sleep(0.02)
        store.set("go", "1")

    def why(self, error: BaseException) -> str | None:
        self.error = error
        until = time.monotonic() + GRACE_S
        while self.failed is None and time.monotonic() < until:
            self.failed = self._ended()
            time.sleep(0.02)
        return None if self.failed is None else str(self.failed)

    def _ended(self) -> BevatronError | None:
        """The failure of the first worker that ended."""
        for rank, worker in enumerate(self.workers, 1):
            if (status := worker.poll()) is not None:
                words = Path(self.folder.name) / f"rank-{rank}.txt"
                if words.is_file():
                    said = words.read_text(encoding="utf-8")
                    return failed(f"rank {rank}: {said}", status)
                how = f"by signal {-status}" if status < 0 else f"with status {status}"
                return failed(f"rank {rank} ended {how}, without a message", status or 70)
        return None

    def _watch(self) -> None:
        while not self.ending:
            if (problem := self._ended()) is not None and not self.ending:
                # Not the one that only lost its peers, if it was not the first to be seen.
                self.failed = self.failed or problem
                self._kill()
                return
            time.sleep(0.1)

    def _kill(self) -> None:
        for worker in self.workers:
            worker.kill()

    def close(self) -> None:
        if self.ending:
            return
        self.ending = True
        if self.ranks is not None and self.failed is None:
            super().close()
            until = time.monotonic() + GRACE_S
            for worker in self.workers:
                with suppress(subprocess.TimeoutExpired):
                    worker.wait(max(0.0, until - time.monotonic()))
        self._kill()
        for worker in self.workers:
            worker.wait()
        if self.ranks is not None:
            with suppress(RuntimeError):
                dist.destroy_process_group()
        self.folder.cleanup()


def _join_torchrun(opened: Opened, plan: Plan) -> Group:
    join_world(plan.where(int(os.environ["RANK"])), LONG.total_seconds())
    if (group := join(opened, plan)) is None:
        raise SystemExit(0)
    return group


def join(opened: Opened, plan: Plan) -> Group | None:
    """As every rank of the default process group: the group on rank 0; the others follow it until
    it closes, and return None."""
    rank = dist.get_rank()
    read: list[ModelWeights] = []
    on_all(lambda: read.append(plan.read(opened, rank)))
    model = Model(opened.spec, read[0], _all_ranks(plan), plan.where(rank))
    if rank == 0:
        return LeadingGroup(model)
    follow(model)
    return None


def _all_ranks(plan: Plan) -> Ranks:
    ranks = share_world(plan.tp, plan.pp)
    assert ranks is not None
    return ranks


def follow(model: Model) -> None:
    """As another rank than 0: compute what it commands, until it ends."""
    while data := model.ranks.next_command():
        with suppress(NoRoom):  # which all ranks find together
            model.run(Step.from_bytes(data))


def _start(plan: Plan, rank: int, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bevatron.generate.engine_worker", json.dumps(asdict(plan))]
    threads = str(max(1, torch.get_num_threads() // (plan.tp * plan.pp)))
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    command += [str(rank), str(port), str(os.getpid())]
    # Ctrl-C is for this process, which then ends its workers.
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)


def work(plan: Plan, rank: int, port: int) -> None:
    """A worker's life."""
    try:
        _work(plan, rank, port)
    except BaseException as error:
        found = failure(error)
        words = Path(plan.last_words) / f"rank-{rank}.txt"
        with suppress(OSError):
            replace_text(words, str(found), durable=False)
        os._exit(found.exit_status)


def _work(plan: Plan, rank: int, port: int) -> None:
    store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=60))
    opened = open_weights(plan.ckpt, copies=False)  # who started this has compared them
    weights = plan.read(opened, rank)
    store.set(f"ready/{rank}", "1")
    store.wait(["go"], timedelta(seconds=START_S))
    with _loopback():
        _init(plan, store, rank, plan.tp * plan.pp)
        ranks = _all_ranks(plan)
    try:
        follow(Model(opened.spec, weights, ranks, plan.where(rank)))
        dist.destroy_process_group()
    except RuntimeError as error:
        if not lost_another(error):
            raise
        # It lost another rank, whose own words are the ones to be read first.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE_S)
        raise BevatronError("lost its connection to another rank") from error


def _backend(device: torch.device) -> str:
    return "gloo" if device.type == "cpu" else str(dist.get_default_backend_for_device(device))


def _init(plan: Plan, store: TCPStore, rank: int, world: int) -> None:
    device = plan.where(rank)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    dist.init_process_group(
        _backend(device), store=store, rank=rank, world_size=world, timeout=LONG
    )


@contextmanager
def _loopback() -> Iterator[None]:
    """gloo meets its peers over the loopback: all are on this machine."""
    if sys.platform != "linux" or "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        yield
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]
