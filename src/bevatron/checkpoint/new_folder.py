"""A folder that appears complete or not at all.

It is written as a hidden sibling `.<name>.partial-<pid>`, synced and renamed. On any error, Ctrl-C
or SIGTERM the sibling goes; what a killed process left is cleared by the next one.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from bevatron.errors import BevatronError


@contextmanager
def new_folder(target: Path, *, overwrite: bool, apart_from: Path | None = None) -> Iterator[Path]:
    """Yields the folder to write into; it becomes `target` when the block ends without error.

    Args:
        overwrite: replace an existing target, which stays until the new one is complete.
        apart_from: what is being read; the target may be neither in it nor around it.
    Raises BevatronError if the target exists or cannot be written; an OSError in the block
    (disk full, read-only) becomes a BevatronError that names the path.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100  (resolve() would follow a link target)
    check_target(target, overwrite=overwrite, apart_from=apart_from)
    made = _make_parents(target.parent)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        _clear_stale(target)
        with _terminable():
            try:
                partial.mkdir()
                yield partial
                _sync_tree(partial)
                _put(partial, target, overwrite)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        _remove_empty(made)
        place = error.filename or target
        raise BevatronError(
            f"{place}: {error.strerror or error}; writing {target} failed and nothing was kept"
        ) from error
    except BaseException:
        _remove_empty(made)
        raise


@contextmanager
def working_folder(target: Path) -> Iterator[Path]:
    """A hidden sibling of `target`, gone afterwards, for what is written on the way to it."""
    target = Path(os.path.abspath(target))  # noqa: PTH100
    made = _make_parents(target.parent)
    pattern = re.compile(re.escape(f".{target.name}.working-") + r"(\d+)")
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)
    folder = target.parent / f".{target.name}.working-{os.getpid()}"
    try:
        with _terminable():
            try:
                folder.mkdir()
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        _remove_empty(made)
        raise


def check_target(target: Path, *, overwrite: bool, apart_from: Path | None = None) -> None:
    """Refuse a target that exists, or that would be mixed up with what is read. Cheap: call it
    before any other work."""
    target = Path(os.path.abspath(target))  # noqa: PTH100
    if apart_from is not None:
        here, there = target.resolve(), apart_from.resolve()
        if here == there or there in here.parents or here in there.parents:
            raise BevatronError(
                f"{target}: the target must lie apart from the source {apart_from}; name a folder "
                "outside of it"
            )
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise BevatronError(
            f"{target}: already exists; name a new folder, or pass --overwrite (in Python "
            "overwrite=True) to replace it"
        )
    here, cwd = target.resolve(), Path.cwd()
    if target.is_symlink() or not target.is_dir() or here == cwd or here in cwd.parents:
        raise BevatronError(
            f"{target}: only a real folder that is not the current one can be overwritten; name "
            "another target"
        )


def sync(path: Path) -> None:
    """fsync a file or folder. Filesystems that cannot sync a folder are left alone."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(fd)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))


def _put(partial: Path, target: Path, overwrite: bool) -> None:
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    try:
        if overwrite and target.exists():
            target.rename(old)
        if target.exists():  # rename(2) would replace an empty folder
            raise FileExistsError(errno.EEXIST, "appeared while it was being written", str(target))
        partial.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)


def _clear_stale(target: Path) -> None:
    """What killed processes left: partial folders go; an old target, moved aside by a process that
    died before its new one stood, comes back."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"(partial|old)-(\d+)")
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if not match or _alive(int(match[2])):
            continue
        if match[1] == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # our own, from an earlier call or an earlier process with our number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def _make_parents(folder: Path) -> list[Path]:
    made: list[Path] = []
    try:
        for path in [*reversed(folder.parents), folder]:
            if not path.exists():
                path.mkdir(exist_ok=True)
                made.append(path)
    except OSError as error:
        _remove_empty(made)
        raise BevatronError(f"{folder}: cannot be made ({error.strerror})") from error
    if not folder.is_dir():
        raise BevatronError(f"{folder}: is not a folder, so nothing can be written into it")
    return made


def _remove_empty(made: list[Path]) -> None:
    for path in reversed(made):
        try:
            path.rmdir()
        except OSError:
            return


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the partial folder is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
