"""Whether a full step can be continued from: everything but its tensors' hashes, which all ranks
check together (`verify_share`)."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from bevatron.checkpoint.manifest import Manifest, NewerFormatError
from bevatron.checkpoint.rank_tables import check_sizes, sizes_of
from bevatron.checkpoint.run_folder import hash_file, step_of
from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import CheckpointError

# What a file system says of a damaged file; anything else (no permission, a server that is away)
# says nothing about the step.
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)


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
