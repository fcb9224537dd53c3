"""Processes of a run on this machine: starting them, passing signals on, and their last words.

torch's elastic agent starts and watches them (what `torchrun` uses); here it also gets SIGTERM,
SIGUSR1 and Ctrl-C to the workers and gives them the time that they need to save.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from bevatron.errors import failed, failure
from bevatron.train.stop_signals import ASKED, PARENT, SIGNALS, Stopping

if TYPE_CHECKING:
    import torch

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's own: where a worker leaves its last words
LAUNCHER = "BEVATRON_LAUNCHER"  # a folder of this launcher; absent under plain torchrun
STOPPED = "stopped"  # the name of a file there: the run ended because it was asked to
ASKED_BY = "asked-by"  # a file there: the name of the signal that the launcher got first
# Of several ranks that fail, the first is the cause. One that only lost its peers waits, so that
# the launcher sees the other one first; it is usually ended meanwhile.
PATIENCE_S = 3.0


@dataclass(frozen=True)
class Nodes:
    """The machines of a run and where they meet. `rendezvous` is HOST:PORT on the first one."""

    count: int = 1
    rendezvous: str = "localhost:0"


ONE_NODE = Nodes()


def launch(
    arguments: list[str],
    nproc: int,
    *,
    nodes: Nodes = ONE_NODE,
    restarts: int = 0,
    saves: bool = True,
) -> None:
    """Start `nproc` processes `python -m bevatron ARGUMENTS` on this machine and wait for them.

    Args:
        restarts: how often all of them are started anew after one failed.
        saves: whether they save when they are asked to stop; for what is said on Ctrl-C.
    Raises the error of the rank that failed first, and SystemExit with 128 + number if the run
    ended because of a signal.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    config = LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=nproc,
        run_id="bevatron",
        rdzv_backend="c10d",
        rdzv_endpoint=nodes.rendezvous,
        max_restarts=restarts,
        monitor_interval=0.2,
        signals_to_handle="",  # they are passed on, below
    )
    with tempfile.TemporaryDirectory(prefix="bevatron-") as folder, _PassOn(saves) as heard:
        os.environ[LAUNCHER], os.environ[PARENT] = folder, str(os.getpid())
        if nodes.count > 1:  # a store for every restart, kept by rank 0; see world.job_store
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        try:
            elastic_launch(config, sys.executable)("-m", "bevatron", *arguments)
        except ChildFailedError as error:
            rank, first = error.get_first_failure()
            if isinstance(first.message, str):  # torch's: it left no words of its own
                heard.leave_if_asked("; nothing to save yet" if saves else "")
            said = first.message if isinstance(first.message, str) else first.message["message"]
            raise failed(f"rank {rank}: {said}", first.exitcode) from None
        finally:
            del os.environ[LAUNCHER], os.environ[PARENT]
        heard.leave_if_asked(None if saves else "")
        if (Path(folder) / STOPPED).exists():
            raise SystemExit(128 + signal.SIGTERM)


class _PassOn:
    """Passes signals on to the workers, which torch starts in sessions of their own."""

    def __init__(self, saves: bool) -> None:
        self.asked: signal.Signals | None = None
        self.saves = saves

    def __enter__(self) -> _PassOn:
        here = threading.current_thread() is threading.main_thread()
        self._before = {s: signal.signal(s, self._pass) for s in SIGNALS} if here else {}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.environ.pop(ASKED, None)

    def _pass(self, number: int, frame: FrameType | None) -> None:
        got = signal.Signals(number)
        if self.asked is signal.SIGINT and got is signal.SIGINT:
            _send(signal.SIGKILL)
            print("\nerror: interrupted", file=sys.stderr, flush=True)
            os._exit(130)
        if self.asked is None:
            self.asked = got
            os.environ[ASKED] = got.name
            if (folder := os.environ.get(LAUNCHER)) is not None:
                (Path(folder) / ASKED_BY).write_text(got.name, encoding="utf-8")
            if got is signal.SIGINT:
                text = "saving after this step; Ctrl-C again stops at once without saving"
                text = text if self.saves else "stopping all processes; Ctrl-C again: at once"
                print(f"\n{text}", file=sys.stderr, flush=True)
        # A worker that is still importing would answer SIGINT with a traceback.
        _send(signal.SIGTERM if got is signal.SIGINT else got)

    def leave_if_asked(self, how: str | None) -> None:
        """End if a signal asked for it. `how` is said if the workers have said nothing of it."""
        if self.asked is not None:
            if how is not None:
                what = (
                    "interrupted" if self.asked is signal.SIGINT else f"ended by {self.asked.name}"
                )
                print(f"error: {what}{how}", file=sys.stderr, flush=True)
            raise SystemExit(128 + self.asked)


def _send(number: signal.Signals) -> None:
    for pid in _children():
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _children() -> list[int]:
    """Process ids of this process's children."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    if listed.exists():
        return [int(pid) for pid in listed.read_text().split()]
    command = ["pgrep", "-P", str(os.getpid())]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def say_stopped() -> None:
    """As a worker: tell the launcher that the run ended because it was asked to."""
    if (folder := os.environ.get(LAUNCHER)) is not None:
        (Path(folder) / STOPPED).touch()


def asked_by(got: signal.Signals) -> str:
    """As a worker: the name of the signal that the run was sent, of which the launcher may have
    passed on another (SIGTERM for Ctrl-C)."""
    folder = os.environ.get(LAUNCHER)
    try:
        return got.name if folder is None else (Path(folder) / ASKED_BY).read_text("utf-8")
    except OSError:  # this process alone was sent it, or the launcher is gone
        return got.name


def last_words(message: str, status: int) -> NoReturn:
    """Leave the message where the launcher finds it, and leave at once, so that it stops the other
    ranks: no destructors, no other threads. Under plain torchrun, which shows less, print it."""
    if (path := os.environ.get(ERROR_FILE)) is not None:
        extra = {"timestamp": str(int(time.time())), "py_callstack": message}
        content = {"message": {"message": message, "extraInfo": extra}}
        Path(path).write_text(json.dumps(content), encoding="utf-8")
    if os.environ.get(LAUNCHER) is None:
        rank = os.environ.get("RANK")
        where = f"rank {rank}: " if rank is not None else ""
        print(f"error: {where}{message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


@contextmanager
def reporting(worker: bool, stopping: Stopping) -> Iterator[None]:
    """What fails inside ends the process with its message, if this process is a `worker`."""
    try:
        yield
    except BaseException as error:
        if worker:
            _fail(error, stopping)
        raise


@contextmanager
def one_rank(
    worker: bool,
    device_kind: str | None = None,
    timeout_s: float = 1800.0,
    stopping: Stopping | None = None,
) -> Iterator[torch.device]:
    """One rank of a verb that runs alone, starts processes of its own, or is one of torchrun's: the
    process group for the duration. Yields this rank's device, of the kind given, as `train.device`.
    A `worker` of a launcher leaves its last words if it fails, and ends here if it does not.

    Args:
        timeout_s: of a collective.
        stopping: what a run was asked by signals, if it listens to them."""
    from bevatron.parallel.on_all_ranks import on_all
    from bevatron.parallel.process_groups import world
    from bevatron.train.hardware import training_device, tune_allocator

    stopping = stopping or Stopping()
    # Reports twice: of what fails inside the group before an end of the group that might hang.
    with reporting(worker, stopping):
        device = training_device(device_kind)
        if device.type == "cpu":
            tune_allocator()
        with world(device, timeout_s), reporting(worker, stopping):
            yield device
            if worker:
                # Leave together and without destructors: gloo's threads may outlive the
                # interpreter's teardown and abort a process whose work is done and saved.
                on_all(lambda: None)
                sys.stdout.flush()
                os._exit(0)


def _fail(error: BaseException, stopping: Stopping) -> NoReturn:
    if _is_lost_peer(error):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how the launcher ends this process
        if stopping.asked is signal.SIGTERM:
            os._exit(1)
        time.sleep(PATIENCE_S)
        first = str(error).strip().splitlines()[0]
        last_words(f"lost its connection to another rank, which failed or was killed ({first})", 1)
    found = failure(error)
    last_words(str(found), found.exit_status)


def _is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed rather than this rank. (gloo raises plain RuntimeErrors.)"""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)
