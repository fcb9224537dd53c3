"""A folder that appears complete or not at all.

The folder is written as its hidden sibling `.<name>.partial`, synced, and renamed. The writer holds
a lock on `.<name>.lock`, which the kernel releases when the process dies. So whoever gets the lock
and finds a partial folder knows that a killed process left it: the folder is cleared, and the work
starts again. On any error, Ctrl-C or SIGTERM both siblings are removed.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from bevatron.checkpoint.folder_lock import lock
from bevatron.checkpoint.storage import check_free, is_remote, threads_are_free, uploaded
from bevatron.errors import BevatronError

SYNC_EVERY_S = 0.2


@contextmanager
def new_folder(target: Path, *, overwrite: bool, apart_from: Path | None = None) -> Iterator[Path]:
    """Yields the folder to write into; it becomes `target` when the block ends without error. If
    `target` is a URL it is uploaded then, its manifest last.

    Args:
        overwrite: replace an existing target, which stays until the new one is complete.
        apart_from: what is being read; the target may be neither in it nor around it.
    Raises BevatronError if the target exists, is being written by another process or cannot be
    written; an OSError in the block (disk full, read-only) becomes a BevatronError that names the
    path.
    """
    if is_remote(target):
        with uploaded(target, overwrite=overwrite) as folder:
            yield folder
        return
    target = Path(os.path.abspath(target))  # noqa: PTH100  (resolve() would follow a link target)
    check_target(target, overwrite=overwrite, apart_from=apart_from)
    made = make_parents(target.parent)
    partial = _sibling(target, "partial")
    try:
        with _terminable(), _lock(target) as locked:
            if locked:
                _clear_stale(target)
            check_target(target, overwrite=overwrite)  # it may have come back, or just been made
            _make_partial(partial, target)
            try:
                with _syncing(partial):
                    yield partial
                _sync_tree(partial)
                put(partial, target, overwrite)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        remove_empty(made)
        place = error.filename or target
        raise BevatronError(
            f"{place}: {error.strerror or error}; writing {target} failed and nothing was kept"
        ) from error
    except BaseException:
        remove_empty(made)
        raise


@contextmanager
def working_folder(target: Path) -> Iterator[Path]:
    """A hidden sibling of `target`, gone afterwards, for what is written on the way to it."""
    target = Path(os.path.abspath(target))  # noqa: PTH100
    made = make_parents(target.parent)
    folder = _sibling(target, "working")
    try:
        with _terminable(), _lock(folder):
            try:
                shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
                folder.mkdir()
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        remove_empty(made)
        raise


def check_target(target: Path, *, overwrite: bool, apart_from: Path | None = None) -> None:
    """Refuse a target that exists, or that would be mixed up with what is read. Cheap: call it
    before any other work."""
    if is_remote(target):
        check_free(target, overwrite=overwrite)
        return
    target = Path(os.path.abspath(target))  # noqa: PTH100
    if apart_from is not None and not is_remote(apart_from):
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


def check_looked_at(
    target: Path, *, overwrite: bool, apart_from: Path | None = None
) -> tuple[str, ...]:
    """`check_target` for who writes nothing: a target that exists is a note, which is returned."""
    there = not is_remote(target) and os.path.lexists(target)
    check_target(target, overwrite=overwrite or there, apart_from=apart_from)
    if overwrite or not there:
        return ()
    return (f"{target}: already exists; without --dry-run this needs --overwrite",)


def check_space(dst: Path, nbytes: int) -> None:
    """Refuse early what cannot fit on the disk."""
    place = Path(tempfile.gettempdir()) if is_remote(dst) else dst.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise BevatronError(
            f"{dst}: needs {nbytes / 1e9:.2f} GB, but {place} has only {free / 1e9:.2f} GB free; "
            "free some space or name another disk"
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


@contextmanager
def new_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write into, which appears as `path` when the block ends without an error. Until
    then, and after an error, an old one stays.

    Args:
        durable: it is on the disk then, whatever happens to the machine.
    Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        if durable:
            sync(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    if durable:
        sync(path.parent)


def replace_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a file as a whole, or leave the old one; see `new_file`. Raises OSError."""
    with new_file(path, durable=durable) as file:
        file.write(text.encode())


@contextmanager
def _syncing(folder: Path) -> Iterator[None]:
    """Send to the disk what is in `folder` while more is written, so that little is left to wait
    for at the end. Errors are left to that end."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(SYNC_EVERY_S):
            try:
                _sync_tree(folder)
            except OSError:
                return

    thread = threading.Thread(target=work, daemon=True)
    try:
        if threads_are_free():
            thread.start()
    except RuntimeError:  # a limit on the number of processes: then all at the end
        pass
    try:
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))


def _sibling(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}"


def _lock(target: Path) -> AbstractContextManager[bool]:
    """Hold the lock of `target`; see `lock`."""
    what = f"{target}: is being written"
    return lock(_sibling(target, "lock"), what, "wait for it, or name another target")


def _make_partial(partial: Path, target: Path) -> None:
    try:
        partial.mkdir()
    except FileExistsError as error:
        raise BevatronError(
            f"{partial}: exists, and this filesystem has no locks that would tell whether it is in "
            f"use; remove it if no other process is writing {target}"
        ) from error


def _clear_stale(target: Path) -> None:
    """What a killed process left, found while holding the lock: its partial folder goes; an old
    target, moved aside by one that died before its new one stood, comes back."""
    old = _sibling(target, "old")
    if old.is_dir() and not os.path.lexists(target):
        old.rename(target)
    for path in (old, _sibling(target, "partial")):
        shutil.rmtree(path, ignore_errors=True)


def put(partial: Path, target: Path, overwrite: bool) -> None:
    """Make `partial` the target. An old one is swapped for it in one step where the system can, so
    that at no moment there is none."""
    old = partial
    if not os.path.lexists(target):
        partial.rename(target)
    elif not overwrite:  # rename(2) would replace an empty folder
        raise FileExistsError(errno.EEXIST, "appeared while it was being written", str(target))
    elif not _exchange(partial, target):
        old = _sibling(target, "old")
        try:
            target.rename(old)
            partial.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step, with Linux's renameat2; False where there is none."""
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2 is None:
        return False
    if renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # an old kernel, or NFS
        return False
    raise OSError(code, os.strerror(code), str(b))


def make_parents(folder: Path) -> list[Path]:
    made: list[Path] = []
    try:
        for path in [*reversed(folder.parents), folder]:
            if not path.exists():
                path.mkdir(exist_ok=True)
                made.append(path)
    except OSError as error:
        remove_empty(made)
        raise BevatronError(f"{folder}: cannot be made ({error.strerror})") from error
    if not folder.is_dir():
        raise BevatronError(f"{folder}: is not a folder, so nothing can be written into it")
    return made


def remove_empty(made: list[Path]) -> None:
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
