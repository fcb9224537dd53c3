"""A lock that a process holds while it writes a folder.

The kernel releases the lock when the process dies, on whatever host it ran and whatever its process
id. The lock's file says who holds it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bevatron.errors import BevatronError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_PAUSE_S = 0.1


@contextmanager
def lock(path: Path, what: str, advice: str, *, patience_s: float = 0.0) -> Iterator[bool]:
    """Hold the lock on the file `path`, which is gone afterwards. Yields False where the filesystem
    has no locks.

    Args:
        what, advice: the message if it is taken: `{what} by {its holder}; {advice}`.
        patience_s: how long to try, for a holder that is being killed.
    Raises BevatronError naming its holder if it is taken."""
    fd, locked = _open_locked(path, what, advice, time.monotonic() + patience_s)
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield locked
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _open_locked(path: Path, what: str, advice: str, deadline: float) -> tuple[int, bool]:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        locked = True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, 200, 0).decode("utf-8", "replace") or "another process"
            os.close(fd)
            if time.monotonic() < deadline:
                time.sleep(_PAUSE_S)
                continue
            raise BevatronError(f"{what} by {holder}; {advice}") from error
        except OSError as error:
            locked = False
            if error.errno not in _NO_LOCKS:
                os.close(fd)
                raise
        try:
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd, locked
        except FileNotFoundError:
            pass
        os.close(fd)  # its last holder has just removed it: no longer the lock
