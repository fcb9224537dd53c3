"""Moving byte ranges between files through one reused buffer.

A range is read once, hashed while it is in the core's cache, converted if asked, and written. This
was measured against copy_file_range plus a second read for the hash: equal or faster, and what is
hashed is exactly what is written, even if the source changes meanwhile (`unchanged.py` notices).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

from bevatron.bridge.dtypes import Converter
from bevatron.checkpoint.boxes import HASH_BUFFER, Hasher, open_for_reading, read_exactly

OPEN_FILES = 64


class Watcher(Protocol):
    """What looks at the bytes as they pass."""

    def update(self, data: memoryview, /) -> None: ...


class Mover:
    """Copies ranges. `advance` is called with the number of source bytes done."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._buffer = memoryview(bytearray(HASH_BUFFER))
        self._files: OrderedDict[tuple[Path, bool], int] = OrderedDict()
        self._advance = advance

    def __enter__(self) -> Mover:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def move(
        self,
        source: tuple[Path, int],
        nbytes: int,
        targets: tuple[tuple[Path, int], ...],
        *,
        read_hashers: tuple[Hasher, ...] = (),
        written_hashers: tuple[Hasher, ...] = (),
        convert: Converter | None = None,
        watch: Watcher | None = None,
    ) -> None:
        """Copy `nbytes` from (file, byte) to each target (file, byte).

        Args:
            read_hashers, watch: fed with the bytes as read; `written_hashers`: as written.
        """
        path, at = source
        fd = self._open(path, write=False)
        done = written = 0
        while done < nbytes:
            data = self._buffer[: min(len(self._buffer), nbytes - done)]
            read_exactly(fd, data, at + done, path)
            for hasher in read_hashers:
                hasher.update(data)
            if watch:
                watch.update(data)
            out = convert(data) if convert else data
            for hasher in written_hashers:
                hasher.update(out)
            for target, position in targets:
                write_exactly(self._open(target, write=True), out, position + written, target)
            done, written = done + len(data), written + len(out)
            self._advance(len(data))

    def write(self, path: Path, at: int, data: bytes) -> None:
        """Write a header or the like."""
        write_exactly(self._open(path, write=True), memoryview(data), at, path)

    def _open(self, path: Path, *, write: bool) -> int:
        key = (path, write)
        fd = self._files.get(key)
        if fd is not None:
            self._files.move_to_end(key)
            return fd
        if len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666) if write else open_for_reading(path)
        self._files[key] = fd
        return fd


def write_exactly(fd: int, data: memoryview, at: int, path: Path) -> None:
    """Write all of `data` at byte `at`. Raises OSError that carries the path."""
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:], at + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
