"""Moving byte ranges between files through a few reused buffers.

A range is read once, hashed while it is in the core's cache, converted if the caller asks for it,
and written by a second thread while the next range is read. This is faster than copy_file_range
with a second read for the hash. It also hashes exactly what is written, even if the source changes
during the copy (`source_changes.py` notices such a change).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from bevatron.checkpoint.dtypes import Converter
from bevatron.checkpoint.read_boxes import HASH_BUFFER, Hasher
from bevatron.checkpoint.storage import File, open_file, threads_are_free

OPEN_FILES = 64
BUFFERS = 4  # of HASH_BUFFER bytes each


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


Places = tuple[tuple[Path, int], ...]


class Mover:
    """Copies ranges. `advance` is called with the number of source bytes done.

    All is written when the `with` block ends; what failed to be is raised there, or earlier."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._work: SimpleQueue[tuple[memoryview, Places, memoryview] | None] = SimpleQueue()
        self._sources: _Open[File] = _Open(open_file)
        self._targets: _Open[_Target] = _Open(_Target)
        self._failed: BaseException | None = None
        self._writer: Thread | None = None
        if threads_are_free():
            self._writer = Thread(target=self._write_all, daemon=True)
        self._advance = advance

    def __enter__(self) -> Mover:
        for _ in range(BUFFERS):
            self._free.put(memoryview(bytearray(HASH_BUFFER)))
        try:
            if self._writer is not None:
                self._writer.start()
        except RuntimeError:  # a limit on the number of processes: then without a second one
            self._writer = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._work.put(None)
            self._writer.join()
        self._sources.close()
        self._targets.close()
        if error is None and self._failed is not None:
            raise self._failed

    def _write_all(self) -> None:
        """The second thread."""
        while (job := self._work.get()) is not None:
            self._write(*job)

    def _write(self, data: memoryview, places: Places, buffer: memoryview) -> None:
        """Write, and give the buffer back; after a failure only that."""
        try:
            for path, at in places if self._failed is None else ():
                self._targets(path).write(data, at)
        except BaseException as error:
            self._failed = error
        self._free.put(buffer)

    def move(
        self,
        source: tuple[Path, int],
        nbytes: int,
        targets: Places,
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
            buffer = self._free.get()
            if self._failed is not None:
                raise self._failed
            data = buffer[: min(len(buffer), nbytes - done)]
            file.read(data, at + done)
            for hasher in read_hashers:
                hasher.update(data)
            if watch:
                watch.update(data)
            out = convert(data) if convert else data
            for hasher in written_hashers:
                hasher.update(out)
            places = tuple((target, position + written) for target, position in targets)
            done, written = done + len(data), written + len(out)
            if self._writer is None:
                self._write(out, places, buffer)
            else:
                self._work.put((out, places, buffer))
            self._advance(len(data))

    def copy(self, source: Path, target: Path) -> None:
        """Copy a file byte for byte."""
        self.write(target, 0, b"")
        self.move((source, 0), source.stat().st_size, ((target, 0),))

    def write(self, path: Path, at: int, data: bytes | memoryview) -> None:
        """Write a header or the like, here and now."""
        buffers = [self._free.get() for _ in range(BUFFERS)]  # the second thread has nothing to do
        for buffer in buffers:
            self._free.put(buffer)
        if self._failed is not None:
            raise self._failed
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
