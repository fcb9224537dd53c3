"""Several processes that tokenize parts. They talk in lines of JSON over pipes.

A worker is `python -m bevatron.data.tokenize_workers`. It is not a fork, because a fork copies the
locks of threads but not the threads; and it is not spawned by multiprocessing, because that would
run the user's script a second time.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import bevatron
from bevatron.data.fast_bpe import FastBpe
from bevatron.data.text_encoder import Choice, Encoder, FastEncoder
from bevatron.data.tokenize_part import Job, make_part
from bevatron.data.tokenize_sources import Part
from bevatron.data.tokenizer import open_tokenizer
from bevatron.errors import failed, failure

BPE = "bpe.json"  # in the folder of the parts: what tiktoken needs, derived and proven once

# What a worker is to do, and the folder to do it in.
Task = tuple[Path, Part]


def in_workers(
    tasks: Sequence[Task], job: Job, choice: Choice, tokenizer: Path, folder: Path, count: int
) -> Iterator[int]:
    """Tokenize parts in `count` processes; yields the number of each as it is done, in any order.

    Args:
        tokenizer: its tokenizer.json; `folder`: where the processes find what they share.
    Raises BevatronError with the message of the first worker that failed, or that died."""
    if choice.bpe is not None:
        (folder / BPE).write_text(choice.bpe.to_json(), encoding="utf-8")
    setup = {
        "parent": os.getpid(),
        "tokenizer": str(tokenizer.resolve()),
        "bpe": str((folder / BPE).resolve()) if choice.bpe is not None else None,
        "job": asdict(job),
    }
    waiting = list(enumerate(tasks))[::-1]
    workers: list[_Worker] = []
    try:
        with selectors.DefaultSelector() as selector:
            for _ in range(min(count, len(tasks))):
                worker = _Worker(setup)
                workers.append(worker)
                selector.register(worker.output, selectors.EVENT_READ, worker)
                worker.give(waiting.pop())
            busy = len(workers)
            while busy:
                for ready, _ in selector.select():
                    worker = ready.data
                    yield worker.answer()
                    if waiting:
                        worker.give(waiting.pop())
                    else:
                        busy -= 1
                        selector.unregister(worker.output)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process, which does one part at a time."""

    def __init__(self, setup: dict[str, Any]) -> None:
        package = str(Path(bevatron.__file__).parent.parent)
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bevatron.data.tokenize_workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self._process.stdout is not None
        self.output = self._process.stdout
        self._number = -1
        self._say(setup)

    def give(self, task: tuple[int, Task]) -> None:
        self._number, (folder, part) = task
        self._say({"folder": str(folder), "part": part.to_json()})

    def answer(self) -> int:
        """The number of the part that it has done."""
        line = self.output.readline()
        if not line:
            status = self._process.wait()
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            hint = "; it may have been out of memory: use fewer --workers" if status == -9 else ""
            raise failed(f"a process that tokenizes ended with {how}{hint}", status)
        answer = json.loads(line)
        if "error" in answer:
            raise failed(answer["error"], answer["status"])
        return self._number

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _say(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead: `answer` will say so


def _serve() -> None:
    """A worker's life: the setup, then a part per line, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it, too
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    parent = 0
    encoder: Encoder | None = None
    job: Job | None = None
    for line in sys.stdin.buffer:
        given = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if job is None or encoder is None:
                parent, job = given["parent"], Job(**given["job"])
                opened = open_tokenizer(Path(given["tokenizer"])).encoder
                encoder = Encoder(opened)
                if given["bpe"] is not None:
                    text = Path(given["bpe"]).read_text(encoding="utf-8")
                    encoder = FastEncoder(opened, FastBpe.from_json(text))
                continue
            part = Part.from_json(given["part"])
            make_part(Path(given["folder"]), part, job, encoder, partial(_is_child_of, parent))
        except Exception as error:
            found = failure(error)
            answer = {"error": str(found), "status": found.exit_status}
        if not _is_child_of(parent):
            return
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _is_child_of(parent: int) -> bool:
    """Whether the process that started this one, which told its number, still lives."""
    return os.getppid() == parent


if __name__ == "__main__":
    _serve()
