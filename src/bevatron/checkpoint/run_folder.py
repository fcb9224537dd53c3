"""A training run's folder: step folders, the `latest` pointer, metrics.jsonl.

A step folder is written into a hidden temporary sibling, its manifest last, synced, renamed; only
then does `latest` move, itself by a rename. A crash at any moment leaves the previous step whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bevatron.checkpoint.manifest import FILE_NAME, Manifest
from bevatron.checkpoint.new_folder import sync

LATEST = "latest"
METRICS = "metrics.jsonl"
_STEP = re.compile(r"step-(\d{8})$")


class RunFolder:
    """Paths and atomic operations; every method but `step_folders` is for one rank alone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def step_folder(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def step_folders(self) -> list[Path]:
        """Complete step folders, oldest first."""
        if not self.path.is_dir():
            return []
        found = [
            p for p in self.path.iterdir() if _STEP.search(p.name) and (p / FILE_NAME).is_file()
        ]
        return sorted(found)

    def newest(self) -> Path | None:
        """The newest complete step folder: the manifest decides, `latest` is for people."""
        return folders[-1] if (folders := self.step_folders()) else None

    def begin(self, step: int) -> Path:
        """An empty temporary folder for this step, on every call a fresh one."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f".step-{step:08d}.partial"
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        return temporary

    def commit(
        self, temporary: Path, step: int, manifest: Manifest, texts: Mapping[str, str]
    ) -> Path:
        """Write the small files, then the manifest; rename; move `latest`."""
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
            sync(temporary / name)
        (temporary / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        sync(temporary / FILE_NAME)
        for folder in (p for p in temporary.rglob("*") if p.is_dir()):
            sync(folder)
        sync(temporary)
        target = self.step_folder(step)
        if target.exists():  # the same step, saved before: it stays until the new one is whole
            old = self.path / f".{target.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
        pointer = self.path / f".{LATEST}.partial"
        pointer.write_text(target.name + "\n", encoding="utf-8")
        sync(pointer)
        pointer.replace(self.path / LATEST)
        sync(self.path)
        return target

    def retain(self, keep: int) -> None:
        """Delete all but the newest `keep` steps; never the newest, and the oldest first."""
        folders = self.step_folders()
        for folder in folders[: max(0, len(folders) - max(1, keep))]:
            (folder / FILE_NAME).unlink()  # from here on it is no checkpoint
            shutil.rmtree(folder)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        with (self.path / METRICS).open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    def drop_metrics_after(self, step: int) -> None:
        """Forget lines of steps that a resumed run will do again, and a line cut by a crash."""
        path = self.path / METRICS
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        partial = path.with_name(f".{METRICS}.partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(path)


def read_train_state(folder: Path) -> dict[str, Any] | None:
    """train_state.json of a step folder; None for a checkpoint without one (an import)."""
    path = folder / "train_state.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
