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
from typing import Generic, Protocol, TypeVar

from bevatron.bridge.dtypes import Converter
from bevatron.checkpoint.boxes import HASH_BUFFER, Hasher
from bevatron.checkpoint.files import File, open_file

OPEN_FILES = 64


class Watcher(Protocol):
    """What looks at the bytes as they pass."""

    def update(self, data: memoryview, /) -> None: ...


class _Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closable)


class _Open(Generic[T]):
    """Open files, the least recently used of too many closed."""

    def __init__(self, make: Callable[[Path], T]) -> None:
        self._make = make
        self._files: OrderedDict[Path, T] = OrderedDict()

    def __call__(self, path: Path) -> T:
        file = self._files.get(path)
        if file is None:
            if len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            file = self._files[path] = self._make(path)
        self._files.move_to_end(path)
        return file

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


class Mover:
    """Copies ranges. `advance` is called with the number of source bytes done."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._buffer = memoryview(bytearray(HASH_BUFFER))
        self._sources: _Open[File] = _Open(open_file)
        self._targets: _Open[_Target] = _Open(_Target)
        self._advance = advance

    def __enter__(self) -> Mover:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sources.close()
        self._targets.close()

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
        file = self._sources(path)
        done = written = 0
        while done < nbytes:
            data = self._buffer[: min(len(self._buffer), nbytes - done)]
            file.read(data, at + done)
            for hasher in read_hashers:
                hasher.update(data)
            if watch:
                watch.update(data)
            out = convert(data) if convert else data
            for hasher in written_hashers:
                hasher.update(out)
            for target, position in targets:
                self._targets(target).write(out, position + written)
            done, written = done + len(data), written + len(out)
            self._advance(len(data))

    def write(self, path: Path, at: int, data: bytes | memoryview) -> None:
        """Write a header or the like."""
        self._targets(path).write(memoryview(data), at)


class _Target:
    """A file that is being written, on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)

    def write(self, data: memoryview, at: int) -> None:
        """Write all of `data` at byte `at`. Raises OSError that carries the path."""
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self.fd, data[done:], at + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        os.close(self.fd)
