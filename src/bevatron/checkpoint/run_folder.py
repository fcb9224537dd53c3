"""A training run's folder: its step folders, the pointer `latest`, and its logs.

Here is decided which step a path means, and whether a run can continue from a step.

A step is written into a hidden sibling folder, its manifest last; the sibling is synced and
renamed, and only then is `latest` replaced, also by a rename. So a crash at any moment leaves the
previous step whole. A step that is deleted to make room is renamed first. A folder under a step's
name was therefore complete once; if it is incomplete, it was damaged from outside. Nothing here
depends on a clock or on the times of files.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bevatron.checkpoint.folder_lock import lock
from bevatron.checkpoint.manifest import FILE_NAME, Manifest, NewerFormatError
from bevatron.checkpoint.new_folder import make_parents, put, remove_empty, replace_text, sync
from bevatron.checkpoint.rank_tables import Merged, check_sizes, sizes_of
from bevatron.checkpoint.read_boxes import hash_file
from bevatron.checkpoint.storage import located
from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import CheckpointError

LATEST = "latest"
METRICS = "metrics.jsonl"
STARTS = "starts.jsonl"
TENSORS = ("model", "optimizer", "carried")  # folders in a step that hold tensors
STEP, WEIGHTS = "step", "weights"  # full steps, and weights alone
_NAME = re.compile(rf"({STEP}|{WEIGHTS})-(\d{{8,}})")
_LEFT = re.compile(rf"\.({STEP}|{WEIGHTS})-\d{{8,}}\.(.*)(partial|deleted)")
_OLD = re.compile(rf"\.(({STEP}|{WEIGHTS})-\d{{8,}})\.old")
LOCK_PATIENCE_S = 3.0  # a run that is restarted at once may find its predecessor still dying
# What a file system says of a damaged file; anything else (no permission, a server that is away)
# says nothing about the step.
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)


class RunFolder:
    """Paths and atomic operations; what writes is for one rank alone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def step_folder(self, step: int, kind: str = STEP) -> Path:
        return self.path / f"{kind}-{step:08d}"

    def folders(self, kind: str = STEP) -> list[Path]:
        """All folders under a step's name, whatever is in them, oldest first."""
        if not self.path.is_dir():
            return []
        names = [m for p in self.path.iterdir() if (m := _NAME.fullmatch(p.name)) is not None]
        found = [(int(m[2]), m[0]) for m in names if m[1] == kind]
        return [self.path / name for _, name in sorted(found) if (self.path / name).is_dir()]

    def step_folders(self) -> list[Path]:
        """Complete full steps, oldest first."""
        return [p for p in self.folders() if (p / FILE_NAME).is_file()]

    def newest(self) -> Path | None:
        """The newest complete step folder: the manifest decides, `latest` is for people."""
        return folders[-1] if (folders := self.step_folders()) else None

    def foreign(self) -> list[str]:
        """Names of what lies here, sorted, if nothing of it is a run's. Hidden names do not count,
        nor steps that were set aside, for which there are others or metrics."""
        if not self.path.is_dir():
            return []
        names = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
        own = (LATEST, METRICS, STARTS)
        return [] if any(n in own or _NAME.fullmatch(n) for n in names) else names

    # --- one writer at a time ---------------------------------------------------------------------

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Hold the folder against other runs, and clear what killed ones left in it.

        A folder that did not exist and in which nothing was put is gone afterwards. Raises
        BevatronError naming the process that holds it already."""
        made = make_parents(self.path.absolute())
        what, advice = f"{self.path}: is in use", "wait for it, stop it, or name another run.dir"
        try:
            with lock(self.path / ".lock", what, advice, patience_s=LOCK_PATIENCE_S) as locked:
                if locked:
                    self._clear()
                yield
        finally:
            remove_empty(made)

    def _clear(self) -> None:
        """Saves that were not finished and steps whose deletion was not; an old step that was
        moved aside for a new one that never came returns."""
        for path in list(self.path.iterdir()):
            if match := _OLD.fullmatch(path.name):
                target = self.path / match[1]
                if not target.exists():
                    path.rename(target)
                shutil.rmtree(path, ignore_errors=True)
            elif _LEFT.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    # --- writing a step ---------------------------------------------------------------------------

    def partial(self, step: int, kind: str = STEP, token: str = "") -> Path:
        """Where a step is written. `token` tells this start of the run from others, of which a
        process may still be alive somewhere."""
        return self.path / f".{kind}-{step:08d}.{token}{'.' if token else ''}partial"

    def begin(self, step: int, kind: str = STEP, token: str = "") -> Path:
        """An empty folder to write a step into, on every call a fresh one."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.partial(step, kind, token)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        return temporary

    def commit(
        self,
        temporary: Path,
        step: int,
        manifest: Manifest | Merged,
        texts: Mapping[str, str],
        kind: str = STEP,
    ) -> Path:
        """Write the small files, then the manifest; rename; move `latest` if it is a full step.

        Raises CheckpointError if the manifest reads back otherwise."""
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        hashes = {name: hash_file(temporary / name) for name in _others(temporary)}
        data = replace(manifest, extra={**manifest.extra, "files": hashes}).to_json().encode()
        (temporary / FILE_NAME).write_bytes(data)
        for name in (*hashes, FILE_NAME):
            sync(temporary / name)
        for folder, _, _ in os.walk(temporary, topdown=False):
            sync(Path(folder))
        target = self.step_folder(step, kind)
        put(temporary, target, overwrite=True)
        if (target / FILE_NAME).read_bytes() != data:
            raise CheckpointError(f"{target / FILE_NAME}: does not read back as it was written")
        if kind == STEP:
            self.point(target)
        return target

    def point(self, target: Path) -> None:
        """Let `latest` name a step."""
        replace_text(self.path / LATEST, target.name + "\n")

    # --- which steps stay -------------------------------------------------------------------------

    def retain(self, keep: int, keep_every: int = 0, kind: str = STEP) -> None:
        """Delete all but the newest `keep` steps and those that `keep_every` divides; never the
        newest, and the oldest first."""
        complete = [p for p in self.folders(kind) if (p / FILE_NAME).is_file()]
        for folder in complete[: max(0, len(complete) - max(1, keep))]:
            if not keep_every or step_of(folder) % keep_every:
                delete_folder(folder)

    def set_aside(self, folder: Path) -> Path:
        """Take a damaged step out of the way, under a name that says so; nothing is deleted."""
        target, number = self.path / f"damaged-{folder.name}", 1
        while target.exists():
            number += 1
            target = self.path / f"damaged-{folder.name}-{number}"
        folder.rename(target)
        sync(self.path)
        return target

    # --- what was logged --------------------------------------------------------------------------

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        self.append(METRICS, line)

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add a line to one of the folder's JSON lines files."""
        with (self.path / name).open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    def metrics(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The lines of metrics.jsonl, as they are and as they read, but for one cut by a crash."""
        path = self.path / METRICS
        if not path.is_file():
            return
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found = json.loads(line)
                int(found["step"])
            except (ValueError, KeyError, TypeError):
                continue
            yield line, found

    def drop_metrics_after(self, step: int) -> list[dict[str, Any]]:
        """Forget lines of steps that a resumed run will do again, and a line cut by a crash.
        Returns those of this step itself."""
        if not (self.path / METRICS).is_file():
            return []
        kept = [(line, found) for line, found in self.metrics() if found["step"] <= step]
        replace_text(self.path / METRICS, "".join(f"{line}\n" for line, _ in kept))
        return [found for _, found in kept if found["step"] == step]


def is_step(name: str) -> bool:
    """Whether a folder of this name is a full step."""
    match = _NAME.fullmatch(name)
    return match is not None and match[1] == STEP


def step_of(folder: Path) -> int:
    """The number in a step folder's name."""
    return int(folder.name.rpartition("-")[2])


def delete_folder(folder: Path) -> None:
    """Delete a folder, which from the first moment on is no checkpoint any more."""
    gone = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(gone, ignore_errors=True)  # left by a killed process
    if folder.is_dir():
        folder.rename(gone)
        shutil.rmtree(gone)


def _others(folder: Path) -> list[str]:
    """Relative paths of all files but the tensors', which the manifest's chunks account for."""
    out = []
    for path in sorted(folder.iterdir()):
        if path.is_file():
            out.append(path.name)
        elif path.name not in TENSORS:
            out += [
                p.relative_to(folder).as_posix() for p in sorted(path.rglob("*")) if p.is_file()
            ]
    return out


def read_train_state(folder: Path) -> dict[str, Any] | None:
    """train_state.json of a step folder; None for a checkpoint without one (an import)."""
    path = folder / "train_state.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# ---------------------------------------------------------------------------------------------
# Which folder a path means: a native checkpoint, or a run and so its latest step
# ---------------------------------------------------------------------------------------------


def is_native(path: Path) -> bool:
    """Whether `path` is a native checkpoint or a run folder. A Hugging Face folder may hold files
    of any name, a manifest.json too; but config.json is never at the top of a native one."""
    if (path / "config.json").exists():
        return False
    return any((path / name).is_file() for name in (FILE_NAME, LATEST)) or bool(
        RunFolder(path).step_folders()
    )


def resolve(path: str | Path) -> Path:
    """The native checkpoint that `path` means: itself, or the step that a run's `latest` names.

    Raises CheckpointError if there is none."""
    path = located(path)
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist; expected a native checkpoint or a run")
    if (path / "config.json").exists():
        raise CheckpointError(
            f"{path}: is a Hugging Face folder, expected a native checkpoint; make one with "
            f"`bevatron import {path} DST`"
        )
    if (path / FILE_NAME).is_file():
        return path
    latest = path / LATEST
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not is_step(name):
            raise CheckpointError(
                f"{latest}: holds {name[:100]!r}, expected the name of a step folder such as "
                "step-00000500"
            )
        if not (path / name / FILE_NAME).is_file():
            raise CheckpointError(
                f"{latest}: names {name}, which is missing or incomplete; complete steps here: "
                f"{', '.join(p.name for p in RunFolder(path).step_folders()) or 'none'}"
            )
        return path / name
    if newest := RunFolder(path).newest():
        return newest
    raise CheckpointError(
        f"{path}: holds neither {FILE_NAME} nor {LATEST}; it is no complete native checkpoint and "
        "no run with a saved step"
    )


# ---------------------------------------------------------------------------------------------
# Whether a full step can be continued from: everything but its tensors' hashes, which all ranks
# check together (`verify_share`)
# ---------------------------------------------------------------------------------------------


def check_whole(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The train state of a full step, after checking that every file is there, in its size, and
    that the small ones hold what was written.

    Raises CheckpointError naming what is not as it was."""
    if manifest.step != step_of(folder):
        raise CheckpointError(f"{folder}: its manifest says step {manifest.step}; it is damaged")
    for name, wanted in manifest.extra.get("files", {}).items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: is missing")
        if (found := hash_file(folder / name)) != wanted:
            raise CheckpointError(f"{folder / name}: has hash {found}, expected {wanted}")
    check_sizes(folder, sizes_of(manifest.tensors))
    if not any(name.startswith("optimizer/") for name in manifest.tensors):
        raise CheckpointError(f"{folder}: holds no optimizer state")
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder / 'config.yaml'}: is missing")
    return read_state(folder, manifest.step)


def read_state(folder: Path, step: int) -> dict[str, Any]:
    """train_state.json with what continuing needs. Raises CheckpointError if it has it not."""
    state = read_object(folder / "train_state.json")
    for key in ("step", "tokens", "samples"):
        if type(state.get(key)) is not int or state[key] < 0:
            raise CheckpointError(
                f"{folder / 'train_state.json'}: {key} is {state.get(key)!r}, expected a number"
            )
    if state["step"] != step:
        raise CheckpointError(
            f"{folder / 'train_state.json'}: step is {state['step']}, expected {step}"
        )
    return state


def is_damage(error: Exception) -> bool:
    """Whether an error says that a step's files are not what was written, rather than that they
    could not be read just now or by this version."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, NewerFormatError):
            return False
        if isinstance(seen, OSError):
            return seen.errno in _LOST
        seen = seen.__cause__
    return True
