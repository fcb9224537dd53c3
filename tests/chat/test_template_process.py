"""The process that templates are rendered in: shared by threads, owned by one process, and replaced
when it has to be stopped."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from bevatron.chat import template_process
from bevatron.chat.chat_messages import ChatError
from bevatron.chat.template_process import render

SAYS = "{{ x }}{{ strftime_now('%Y') }}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
NOW = datetime(1989, 11, 9)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def says(x: Any) -> str:
    return render(SAYS, {"x": x}, NOW).text


def worker_pid() -> int:
    assert says(1) == "11989"
    assert template_process._shared.worker is not None
    return template_process._shared.worker.process.pid


def test_threads_share_one_process_and_get_their_own_answers() -> None:
    pid = worker_pid()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(says, range(200)))
    assert answers == [f"{x}1989" for x in range(200)]
    assert worker_pid() == pid


def _in_a_fork(queue: Any) -> None:
    queue.put([says(x) for x in range(20)] + [worker_pid()])


def test_a_forked_process_has_one_of_its_own() -> None:
    pid = worker_pid()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_in_a_fork, args=(queue,)) for _ in range(2)]
    for child in children:
        child.start()
    assert [says(x) for x in range(100)] == [f"{x}1989" for x in range(100)]
    answers = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert all(answer[:-1] == [f"{x}1989" for x in range(20)] for answer in answers)
    assert len({pid, *(answer[-1] for answer in answers)}) == 3
    assert worker_pid() == pid


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    status = Path(f"/proc/{pid}/stat")  # nobody may be there to take in what has ended
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_it_dies_with_its_parent() -> None:
    program = (
        "import time; from tests.chat.test_template_process import worker_pid;"
        "print(worker_pid(), flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
        parent.wait()
    until = time.monotonic() + 60
    while not gone(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert gone(pid)


def test_ctrl_c_stops_a_rendering_and_the_next_one_is_right() -> None:
    pid = worker_pid()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            render(ENDLESS, {}, NOW)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, handler)
    assert says("after") == "after1989"
    assert gone(pid)


def test_a_terminals_ctrl_c_does_not_reach_it() -> None:
    assert os.getsid(worker_pid()) != os.getsid(0)


def test_one_that_was_killed_or_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pid = worker_pid()
    os.kill(pid, signal.SIGKILL)
    assert template_process._shared.worker is not None
    template_process._shared.worker.process.wait()
    other = worker_pid()
    assert other != pid
    monkeypatch.setattr(template_process, "PATIENCE", 0.2)
    os.kill(other, signal.SIGSTOP)
    with pytest.raises(ChatError, match=r"does not answer within 0\.2 s; stopped"):
        says(1)
    monkeypatch.undo()
    assert worker_pid() != other and gone(other)


def test_its_memory_is_watched_where_the_system_does_not_limit_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker_pid()
    assert template_process._shared.worker is not None
    monkeypatch.setattr(template_process._shared.worker, "limits_memory", False)
    monkeypatch.setattr(template_process, "MEMORY", 1 << 20)
    monkeypatch.setattr(template_process, "WATCH", 0.01)
    with pytest.raises(ChatError, match="takes more memory than a chat can need; stopped"):
        render(ENDLESS, {}, NOW)


@linux
def test_it_has_given_away_its_privileges() -> None:
    pid = worker_pid()
    folder = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    assert status["NoNewPrivs"].strip() == "1"
    assert "0" not in status["Uid"].split(), "root's"
    limits = (folder / "limits").read_text()
    for name in ("file size", "open files", "processes", "core file size"):
        (line,) = (line for line in limits.splitlines() if line.startswith(f"Max {name} "))
        expected = ["3", "3"] if name == "open files" else ["0", "0"]
        assert line.removeprefix(f"Max {name}").split()[:2] == expected
    named = (folder / "environ").read_text().split("\0")
    assert {entry.partition("=")[0] for entry in named} <= {*template_process.ENVIRONMENT, ""}


def test_it_imports_neither_torch_nor_this_package() -> None:
    worker = str(Path(template_process.__file__).with_name("template_worker.py"))
    program = f"import runpy, sys; runpy.run_path({worker!r}); print(*sys.modules)"
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "bevatron", "numpy", "tokenizers"} & set(said.split())
