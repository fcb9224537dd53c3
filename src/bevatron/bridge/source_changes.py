"""Noticing that a source changes while it is read.

Hashes are taken of what is written. If another process rewrites a source file during a conversion,
the result would therefore be consistent, and wrong. So size, time and inode of every source file
are noted before the first byte is read, and compared before the result is committed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bevatron.checkpoint.storage import is_remote
from bevatron.errors import BevatronError

Stamp = tuple[int, int, int]


def stamps(folder: Path, skip: tuple[str, ...] = ()) -> dict[str, Stamp]:
    """Every file below `folder`, by relative path, but for what lies in folders named `skip`.
    None of a URL: what lies there cannot be changed in place."""
    found: dict[str, Stamp] = {}
    if is_remote(folder):
        return found
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in skip]
        for name in files:
            path = Path(root) / name
            stamp = _stamp(path)
            if stamp:
                found[path.relative_to(folder).as_posix()] = stamp
    return found


@contextmanager
def unchanged(folder: Path, before: Mapping[str, Stamp]) -> Iterator[None]:
    """Raises BevatronError naming the first file that has changed when the block ends, also where
    the block fails: a file that shrinks looks damaged from inside."""
    try:
        yield
    except (BevatronError, OSError) as error:
        _check(folder, before, error)
        raise
    _check(folder, before, None)


def _check(folder: Path, before: Mapping[str, Stamp], cause: Exception | None) -> None:
    for name, stamp in before.items():
        now = _stamp(folder / name)
        if now != stamp:
            what = f"{stamp[0]} bytes, then {now[0]}" if now and now[0] != stamp[0] else "new data"
            raise BevatronError(
                f"{folder / name}: changed while it was being read "
                f"({what if now else 'it is gone'}); run again when nothing writes to it"
            ) from cause


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
