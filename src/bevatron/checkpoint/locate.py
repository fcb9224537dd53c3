"""Which folder a path means: a native checkpoint, or a run and so its latest step."""

from __future__ import annotations

import re
from pathlib import Path

from bevatron.checkpoint.manifest import FILE_NAME
from bevatron.checkpoint.storage import located
from bevatron.errors import CheckpointError

STEP = re.compile(r"step-\d{8,}")


def is_native(path: Path) -> bool:
    """Whether `path` is a native checkpoint or a run folder. A Hugging Face folder may hold files
    of any name, a manifest.json too; but config.json is never at the top of a native one."""
    if (path / "config.json").exists():
        return False
    return any((path / name).is_file() for name in (FILE_NAME, "latest")) or bool(_steps(path))


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
    latest = path / "latest"
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not STEP.fullmatch(name):
            raise CheckpointError(
                f"{latest}: holds {name[:100]!r}, expected the name of a step folder such as "
                "step-00000500"
            )
        if not (path / name / FILE_NAME).is_file():
            raise CheckpointError(
                f"{latest}: names {name}, which is missing or incomplete; complete steps here: "
                f"{', '.join(_steps(path)) or 'none'}"
            )
        return path / name
    if steps := _steps(path):
        return path / steps[-1]
    raise CheckpointError(
        f"{path}: holds neither {FILE_NAME} nor latest; it is no complete native checkpoint and "
        "no run with a saved step"
    )


def _steps(path: Path) -> list[str]:
    """The complete step folders of a run, oldest first."""
    steps = (p.name for p in path.glob("step-*") if STEP.fullmatch(p.name))
    complete = (name for name in steps if (path / name / FILE_NAME).is_file())
    return sorted(complete, key=lambda name: int(name.removeprefix("step-")))
