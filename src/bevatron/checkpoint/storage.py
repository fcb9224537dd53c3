"""Where checkpoints lie: in a folder on disk, or behind a URL that fsspec reads (s3://, gs://).

A path is pathlib's, or universal_pathlib's for a URL. Both have the same methods. The few things
that differ are here: telling the two apart, reading ranges, and uploading a whole folder.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from bevatron.checkpoint.manifest import FILE_NAME
from bevatron.errors import BevatronError, CheckpointError

READAHEAD = 8 << 20  # bytes per request to a remote file


def located(path: str | Path) -> Path:
    """The path that a text means: `scheme://...` is a URL, all else lies on disk.

    Raises BevatronError if no installed package reads such URLs."""
    text = str(path)
    if not is_url(text):
        return Path(path)
    from upath import UPath

    try:
        remote = UPath(text)
        remote.fs  # noqa: B018  (makes the filesystem, which may want a package)
    except (ImportError, ValueError) as error:
        raise BevatronError(f"{text}: cannot be read ({error})") from error
    if remote.protocol in ("file", "local"):
        return Path(remote.path)
    return cast(Path, remote)


def is_url(text: str) -> bool:
    scheme, found, _ = text.partition("://")
    return bool(found) and scheme.replace("+", "").isalnum()


def is_remote(path: Path) -> bool:
    """Whether `located` gave a URL."""
    return not isinstance(path, Path)


def threads_are_free() -> bool:
    """False under a limit on the address space (RLIMIT_AS), of which every thread's allocator
    reserves up to 128 MiB."""
    try:
        import resource
    except ImportError:  # not a Unix system
        return True
    return resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


class File(Protocol):
    """An open file. `size` in bytes."""

    size: int

    def read(self, out: memoryview, at: int) -> None:
        """Fill `out` with the bytes from `at` on. Raises CheckpointError if the file ends before
        (truncated, or changed while it was read) or cannot be read."""

    def close(self) -> None: ...


def open_file(path: Path) -> File:
    """Open for reading. Raises CheckpointError naming `path`.

    A path may stand for what is computed when it is read; it opens itself then."""
    computed: Callable[[], File] | None = getattr(path, "open_computed", None)
    if computed is not None:
        return computed()
    return _Remote(path) if is_remote(path) else _Local(path)


class _Local:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self.size = os.fstat(self.fd).st_size
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from error

    def read(self, out: memoryview, at: int) -> None:
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self.fd, [out[done:]], at + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from error
            if not count:
                raise _too_short(self.path, at + done, at + len(out))
            done += count

    def close(self) -> None:
        os.close(self.fd)


class _Remote:
    def __init__(self, path: Path) -> None:
        self.path = path
        remote: Any = path
        try:
            self.file = remote.fs.open(
                remote.path, "rb", block_size=READAHEAD, cache_type="readahead"
            )
            self.size = int(remote.fs.size(remote.path))
        except Exception as error:  # every filesystem raises its own kinds
            raise CheckpointError(f"{path}: cannot be opened ({_why(error)})") from error

    def read(self, out: memoryview, at: int) -> None:
        done = 0
        try:
            self.file.seek(at)
            while done < len(out):
                count = self.file.readinto(out[done:])
                if not count:
                    raise _too_short(self.path, at + done, at + len(out))
                done += count
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.path}: cannot be read ({_why(error)})") from error

    def close(self) -> None:
        self.file.close()


def _too_short(path: Path, end: int, wanted: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: ends at byte {end}, expected at least {wanted} bytes; the file is truncated: "
        "restore it from its source"
    )


def _why(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__


def check_free(target: Path, *, overwrite: bool) -> None:
    """Refuse a URL that holds anything: an object store cannot swap one folder for another, so
    nothing there is ever replaced."""
    remote: Any = target
    try:
        taken = remote.exists() and any(True for _ in remote.iterdir())
    except Exception as error:  # every filesystem raises its own kinds
        raise BevatronError(f"{target}: cannot be reached ({_why(error)})") from error
    if taken:
        advice = "; --overwrite works on disk only: remove it first" if overwrite else ""
        raise BevatronError(f"{target}: already exists{advice}, or name another target")


@contextmanager
def uploaded(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields a folder on disk; when the block ends without error it is copied to the URL `target`,
    its manifest last, which commits it.

    What a failed upload left has no manifest, and is removed. Raises BevatronError."""
    check_free(target, overwrite=overwrite)
    remote: Any = target
    with tempfile.TemporaryDirectory(prefix="bevatron-") as temporary:
        folder = Path(temporary) / "checkpoint"
        folder.mkdir()
        yield folder
        try:
            _upload(folder, remote)
        except BaseException as error:
            remote.fs.rm(remote.path, recursive=True)
            if isinstance(error, Exception):
                raise BevatronError(f"{target}: cannot be written ({_why(error)})") from error
            raise


def _upload(folder: Path, target: Any) -> None:
    from bevatron.progress import progress

    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / FILE_NAME)
    total = sum(p.stat().st_size for p in files)
    with progress("uploading", total=total, unit="B") as advance:
        for path in [*files, folder / FILE_NAME]:
            goal = target / path.relative_to(folder).as_posix()
            goal.parent.mkdir(parents=True, exist_ok=True)
            target.fs.put_file(str(path), goal.path)
            advance(path.stat().st_size if path.name != FILE_NAME else 0)


def copy_tree(source: Path, target: Path, copy: Callable[[Path, Path], None]) -> int:
    """Copy all files below `source` with `copy(from, to)`; folders are made, empty ones too. The
    number of files."""
    count = 0
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*"), key=str):
        goal = target / path.relative_to(source).as_posix()
        if path.is_dir():
            goal.mkdir(parents=True, exist_ok=True)
        else:
            goal.parent.mkdir(parents=True, exist_ok=True)
            copy(path, goal)
            count += 1
    return count
