"""The processes of a run on this machine: how they start, are asked to stop, and end.

A launcher starts them through torch's elastic agent (what `torchrun` uses), passes SIGTERM, SIGUSR1
and Ctrl-C on to them, gives them the time that they need to save, and shows their last words.

In a process of a run, a signal (SIGUSR1 comes before a time limit) only sets a flag. The loop
looks at the flag before every batch. A rank that was asked to stop brings no samples, and all ranks
learn this by the exchange at the beginning of a step (`Trainer.step`), so all stop after the same
step. Waiting for data ends at once; a step, an evaluation batch or a save that has begun is
finished first. A second Ctrl-C ends the process at once.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

from bevatron.errors import failed, failure

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A launcher that was asked to stop tells workers that it starts afterwards (a restart).
ASKED = "BEVATRON_STOP"
PARENT = "BEVATRON_PARENT"  # a launcher tells its workers its process number
PARENT_S = 0.5
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's own: where a worker leaves its last words
LAUNCHER = "BEVATRON_LAUNCHER"  # a folder of this launcher; absent under plain torchrun
STOPPED = "stopped"  # the name of a file there: the run ended because it was asked to
ASKED_BY = "asked-by"  # a file there: the name of the signal that the launcher got first
# Of several ranks that fail, the first is the cause. One that only lost its peers waits, so that
# the launcher sees the other one first; it is usually ended meanwhile.
PATIENCE_S = 3.0


# --- a launcher -----------------------------------------------------------------------------------


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


# --- being asked to stop --------------------------------------------------------------------------


class _Interrupted(BaseException):
    """Leaves a wait. A BaseException, so that no reader takes it for an error of its own."""


class Stopping:
    """Use as a context around a run; outside of the main thread it hears nothing.

    Attributes:
        asked: the signal that this process got, None if none.
        begun: whether a step has been taken, so that there is something to save.
        current: the one whose context this process is in.
    """

    current: ClassVar[Stopping | None] = None

    def __init__(self) -> None:
        told = os.environ.get(ASKED)
        self.asked: signal.Signals | None = signal.Signals[told] if told else None
        self.begun = False
        self._waiting = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
            Stopping.current = self
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
            Stopping.current = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        got = signal.Signals(number)
        if self.asked is signal.SIGINT and got is signal.SIGINT:
            print("\nerror: interrupted", file=sys.stderr, flush=True)
            os._exit(130)
        if self.asked is None:
            self.asked = got
            if got is signal.SIGINT:
                text = "\nsaving after this step; Ctrl-C again stops at once without saving"
                print(text, file=sys.stderr, flush=True)
        if self._waiting:
            self._waiting = False
            raise _Interrupted

    def unless_asked(self, get: Callable[[], T], together: bool = False) -> T | None:
        """What `get` returns; None if the run is to stop, also if that is heard while it waits.

        Args:
            together: all ranks take part in `get`, so it begins on all or none, and is not left.
        """
        if together:
            from bevatron.parallel.on_all_ranks import on_all

            return None if any(on_all(lambda: self.asked is not None)) else get()
        try:
            try:
                self._waiting = True
                return get() if self.asked is None else None
            finally:
                self._waiting = False
        except _Interrupted:
            return None


def end_with_parent(parent: int | None = None) -> None:
    """From here on this process does not outlive the one that started it, however that dies: a
    thread looks every half second. A run with something to save is asked to stop; any other
    process ends at once, whatever it waits for.

    Args:
        parent: the number of the process that started this one, told by it: it may have died before
            this call. None: whoever is the parent now.
    """
    parent = os.getppid() if parent is None else parent

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_S)
        if Stopping.current is None or not Stopping.current.begun:
            os._exit(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, name="bevatron-parent", daemon=True).start()


def end_with_agent() -> None:
    """The same for a process that a launcher of ours or torchrun has started; no other one."""
    told = os.environ.pop(PARENT, None)  # not for what this process may start
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(None if told is None else int(told))


# --- last words -----------------------------------------------------------------------------------


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
