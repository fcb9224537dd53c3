"""Saves of a run in processes that die at every call that changes a file or folder.

A program of its own, so that it can fork: `python -m tests.checkpoint.children KIND FOLDER` prints
how many deaths were survived and what went wrong.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bevatron.checkpoint import new_folder
from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.run_folder import RunFolder, check_whole
from bevatron.checkpoint.save_and_load import Saved, box_reader, verify_share
from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.run_start import Start
from bevatron.train.save_steps import Saver

SPEC = ModelSpec(8, 4, (LayerSpec(Attention(2, 1, 2), MLP(6)),))
KEEP = 2
LAST = 30  # points from the commit on, and some before it


class Tensors:
    """What a trainer has to save, of known values. On two ranks each has its own half."""

    device = torch.device("cpu")

    def __init__(self, step: int) -> None:
        self.step = step

    def to_save(self) -> list[Saved]:
        out, ranks = [], dist.get_world_size()
        for number, parameter in enumerate(SPEC.parameters()):
            if number % ranks != dist.get_rank():
                continue
            values = torch.full(parameter.shape, float(100 * self.step + number))
            for prefix in ("model", "optimizer/exp_avg"):
                out.append(Saved(f"{prefix}/{parameter.name}", values, values, torch.float32))
        return out


def save(run: Path, step: int, rank: int = 0, ranks: int = 1, store: Path | None = None) -> None:
    """A real save into `run`, by this rank of `ranks`, with the deletion of older steps."""
    made = dist.FileStore(str(store), ranks) if store else dist.HashStore()
    dist.init_process_group("gloo", store=made, rank=rank, world_size=ranks)
    config = RunConfig.model_validate(
        {
            "model": {"spec": "s"},
            "data": {"train": [{"path": "t"}], "seq_len": 4},
            "train": {"steps": 9, "global_batch": 1},
            "optimizer": {"lr": 1.0},
            "checkpoint": {"keep": KEEP, "weights_every": 1, "weights_keep": 1},
            "run": {"dir": str(run)},
        }
    )
    trainer: Any = Tensors(step)
    saver = Saver(config, Start(SPEC, None, None, "llama"), RunFolder(run), trainer)
    saver.save(step, step, ("step", "weights") if ranks > 1 else ("step",))
    saver.finish(step, step)


def arm(number: int) -> list[int]:
    """Let this process die at point `number`: before or after a call that changes a file or
    folder, or in the middle of a write. Returns where the points passed are counted."""
    passed = [0]

    def tick() -> None:
        passed[0] += 1
        if passed[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tick()
            result = real(*args, **kwargs)
            tick()
            return result

        return call

    whole = io.open

    class Halves:
        """A file whose every write reaches it in two parts."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                self.file.write(part)
                self.file.flush()
                tick()
            return len(data)

        def __enter__(self) -> Halves:
            return self

        def __exit__(self, *exc: object) -> None:
            self.file.close()
            tick()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = whole(file, mode, *args, **kwargs)
        if mode[0] not in "wa":
            return opened
        tick()
        return Halves(opened)

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
        setattr(os, name, watched(getattr(os, name)))
    io.open = open_  # type: ignore[assignment]
    new_folder._exchange = watched(new_folder._exchange)
    return passed


def forked(act: Callable[[], None]) -> int:
    """Run in a process of its own; its number."""
    child = os.fork()
    if not child:
        try:
            act()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def points(run: Path, step: int) -> int:
    """How many points a save has at which it can be killed."""
    read, write = os.pipe()

    def act() -> None:
        passed = arm(0)
        save(run, step)
        os.write(write, str(passed[0]).encode())

    assert ended(forked(act)) == 0
    return int(os.read(read, 20))


def wrong(run: Path, allowed: Sequence[list[int]]) -> str | None:
    """What is wrong with a run's folder: every folder under a step's name must be whole and hold
    its step's values, and these must be the ones that can be there."""
    folder = RunFolder(run)
    found = []
    for path in [*folder.folders(), *folder.folders("weights")]:
        manifest = read_manifest(path)
        verify_share(path, manifest, 0, 1)
        read = box_reader(path, manifest, "model/")
        for number, parameter in enumerate(SPEC.parameters()):
            values = read(parameter.name, (0,) * len(parameter.shape), parameter.shape)
            if not (values == 100 * manifest.step + number).all():
                return f"{path.name} holds other values of {parameter.name}"
        if path.name.startswith("step"):
            found.append(manifest.step)
            check_whole(path, manifest)
    if found not in allowed:
        return f"steps {found}, expected one of {allowed}"
    latest = folder.path / "latest"
    if latest.read_text() not in {f"step-{n:08d}\n" for n in found[-2:]}:
        return f"latest says {latest.read_text()!r}, there are {found}"
    return None


def reset(run: Path, kind: str) -> None:
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(run.with_name("before"), run)
    if kind == "no-swap":
        new_folder._exchange = lambda a, b: False


def killed(kind: str, root: Path) -> tuple[int, list[str]]:
    """`kind`: `new` (step 3 after 1 and 2), `again` (step 2 is saved anew), `no-swap` (that on a
    system without renameat2), `two` (`new` on two ranks, of which either is killed)."""
    run, step = root / "run", 3 if kind in ("new", "two") else 2
    before = run.with_name("before")
    for number in (1, 2):
        assert ended(forked(lambda number=number: save(before, number))) == 0
    reset(run, kind)
    total = points(run, step)
    done = [2, 3] if step == 3 else [1, 2]
    # Under way the old steps are all there, and the new one beside them until the oldest goes.
    allowed = [[1, 2], done] if step == 2 else [[1, 2], [1, 2, 3], done]
    if kind == "no-swap":
        allowed.append([1])  # between the two renames; the next start brings it back
    failures, cases = [], 0
    ranks = 2 if kind == "two" else 1
    first = 1 if kind == "new" else max(1, total - LAST)  # the rest is as in `new`
    for victim in range(ranks):
        for point in range(1, 2 * total, 9) if ranks == 2 else range(first, total + 1):
            reset(run, kind)
            store = root / f"store-{victim}-{point}" if ranks > 1 else None

            def act(armed: bool, rank: int, point: int = point, store: Path | None = store) -> None:
                if armed:
                    arm(point)
                save(run, step, rank, ranks, store)

            children = [forked(partial(act, rank == victim, rank)) for rank in range(ranks)]
            status = ended(children[victim])
            for rank, child in enumerate(children):
                if rank != victim:
                    if status:
                        os.kill(child, signal.SIGKILL)
                    ended(child)
            if status == 0 and ranks > 1:
                continue  # a rank that does not commit has fewer points
            cases += 1
            if status != -signal.SIGKILL:
                failures.append(f"point {point} of {total} was not reached: status {status}")
            if problem := wrong(run, allowed):
                failures.append(f"{kind}, rank {victim} killed at {point}: {problem}")
            with RunFolder(run).occupied():
                pass  # as a start does, which clears
            if kind == "no-swap" and (problem := wrong(run, allowed[:2])):
                failures.append(f"{kind}, started after {point}: {problem}")
            if point % 3:
                continue
            again = ended(forked(lambda: save(run, step)))
            left = [p.name for p in run.iterdir() if p.name.startswith(".")]
            if again or left or (problem := wrong(run, [done])):
                failures.append(f"{kind}, {point}: the next save: {again}, {left}, {problem}")
    return cases, failures


def main() -> None:
    kind, root = sys.argv[1:]
    os.fsync = lambda fd: None  # for speed: only lost power, unlike a kill, loses written pages
    torch.set_num_threads(1)
    cases, failures = killed(kind, Path(root))
    print(json.dumps({"cases": cases, "failures": failures}))


if __name__ == "__main__":
    main()
