"""Disks that fill up or cannot be written, processes that are killed, race, or find their source
changing: there is an old target or a complete new one, nothing beside it, and a rerun works."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bevatron.bridge import assemble, convert, import_hf
from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.checkpoint.new_folder import new_folder
from bevatron.errors import BevatronError
from tests.bridge.hf_folders import assert_same_folder, make, rewrite
from tests.faults.children import CALLS
from tests.faults.refusal import EMBED, NORM, WEIGHTS, contents, file_of, refused

# Of pruning, which ends as the other two do, the options that have most to lose
OFTEN = [(verb, option) for verb in ("import", "export") for option in ("new", "overwrite")]
OFTEN += [("prune", "overwrite"), pytest.param("prune", "new", marks=pytest.mark.slow)]
SWAPS = [(verb, "overwrite-without-swap") for verb in ("import", "export")]
SWAPS += [pytest.param("prune", "overwrite-without-swap", marks=pytest.mark.slow)]
ROOT = Path(__file__).parents[2]
UNSHARE = ["unshare", "--map-root-user", "--mount"]


def python(*arguments: object, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=1800
    )


def child(what: str, verb: str, root: Path, option: str, *, mounts: bool = False) -> int:
    """Run tests/faults/children.py; how many cases went well."""
    before = tuple(UNSHARE) if mounts else ()
    done = python("-m", "tests.faults.children", what, verb, root, option, before=before)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["failures"] == []
    return found["cases"]


@pytest.fixture(scope="module")
def can_mount() -> None:
    command = [*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    done = subprocess.run(command, check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"no filesystem can be mounted here: {done.stderr.decode().strip()}")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with few files, `a` and `b`."""
    root = tmp_path_factory.mktemp("small")
    for name, vocabulary in (("a", 64), ("b", 256)):
        sizes = {"vocab_size": vocabulary, "num_hidden_layers": 1}
        make(root / name, dtype="bfloat16", shard="20KB", **sizes)
        for path in ("docs", "empty"):
            shutil.rmtree(root / name / path)
    return root


@pytest.fixture
def pair(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "pair"))


# --- disks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verb", "option"), OFTEN)
def test_fault_33_disk_full_at_every_page(can_mount, pair: Path, verb: str, option: str) -> None:
    assert child("full", verb, pair, option, mounts=True) > 15


@pytest.mark.parametrize("limit", [0, 1000, 5000, 15000])
@pytest.mark.parametrize("verb", CALLS)
def test_fault_33_a_write_that_fails_in_any_file(model, verb: str, limit: int) -> None:
    """A limit on the size of files stands in for a full disk where none can be mounted."""
    source = model()
    if verb != "import":
        import_checkpoint(source, source.parent / "native")
        source = source.parent / "native"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        refused_with_limit(source, verb)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    CALLS[verb](source, source.parent / "target")


def refused_with_limit(source: Path, verb: str) -> None:
    call = CALLS[verb]
    before = sorted(source.parent.iterdir())
    with pytest.raises(BevatronError, match=r"target.*File too large"):
        call(source, source.parent / "target")
    assert sorted(source.parent.iterdir()) == before
    (source.parent / "target" / "old").mkdir(parents=True)
    with pytest.raises(BevatronError, match=r"target.*File too large"):
        call(source, source.parent / "target", overwrite=True)
    (source.parent / "target" / "old").rmdir()
    (source.parent / "target").rmdir()
    assert sorted(source.parent.iterdir()) == before


@pytest.mark.parametrize(("verb", "option"), OFTEN)
def test_fault_35_read_only_disk(can_mount, pair: Path, verb: str, option: str) -> None:
    assert child("read-only", verb, pair, option, mounts=True) == 1


@pytest.mark.parametrize("place", ["/dev/null/target", "/dev/full/target", "/proc/target"])
def test_fault_35_targets_that_can_never_be(model, place: str) -> None:
    with pytest.raises(BevatronError, match=os.path.dirname(place)):  # noqa: PTH120
        import_checkpoint(model(), place)


@pytest.mark.parametrize("verb", ["import", "export"])
def test_fault_35_existing_target(model, tmp_path: Path, verb: str) -> None:
    source = model()
    native = tmp_path / "native"
    import_checkpoint(source, native)
    call, given = (import_checkpoint, source) if verb == "import" else (export_checkpoint, native)
    there = tmp_path / "there"
    there.mkdir()
    (there / "mine").write_text("x")
    with pytest.raises(BevatronError, match="already exists"):
        call(given, there)
    for target, overwrite in ((given / "sub", False), (given, True), (given.parent, True)):
        with pytest.raises(BevatronError, match="apart from the source"):
            call(given, target, overwrite=overwrite)
    (tmp_path / "link").symlink_to(there)
    with pytest.raises(BevatronError, match="only a real folder"):
        call(given, tmp_path / "link", overwrite=True)
    with pytest.raises(BevatronError, match="only a real folder"):
        call(given, there / "mine", overwrite=True)
    assert (there / "mine").read_text() == "x"
    with pytest.raises(BevatronError, match="not a folder"):
        call(given, there / "mine" / "target")
    call(given, there, overwrite=True)
    assert not (there / "mine").exists()


def test_fault_35_sources_of_the_wrong_kind(model, tmp_path: Path) -> None:
    source = model()
    import_checkpoint(source, tmp_path / "work" / "native")
    refused(tmp_path / "work" / "no such", "does not exist")
    refused(source, "is a Hugging Face folder", verb="export")
    refused(tmp_path / "work" / "native", "native checkpoint already")
    refused(source / "config.json", "is not a folder")


# --- memory --------------------------------------------------------------------------------------


def test_fault_36_memory_of_two_shards(tmp_path: Path) -> None:
    """Ten shards pass through a process that may grow by the size of two; of three if the dtype
    changes."""
    source = make(
        tmp_path / "hf",
        dtype="bfloat16",
        shard="12MB",
        hidden_size=512,
        intermediate_size=2560,
        num_hidden_layers=12,
    )
    sizes = [p.stat().st_size for p in source.glob("*.safetensors")]
    assert len(sizes) >= 9
    code = f"""
import resource
from pathlib import Path
import numpy
from bevatron.bridge.convert import export_checkpoint, import_checkpoint
hf, root = {str(source)!r}, {str(tmp_path)!r}
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
def limit(shards): resource.setrlimit(resource.RLIMIT_AS, (now + shards * {max(sizes)}, -1))
limit(2)
import_checkpoint(hf, root + "/native")
export_checkpoint(root + "/native", root + "/out")
limit(3)
export_checkpoint(root + "/native", root + "/float", dtype="fp32")
try:
    bytearray(4 * {max(sizes)})
except MemoryError:
    print("limited")
"""
    done = python("-c", code)
    assert (done.stdout, done.stderr) == ("limited\n", "")
    assert_same_folder(source, tmp_path / "out")


# --- killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verb", "option"), [*OFTEN, *SWAPS])
def test_fault_34_killed_at_every_write_then_run_again(pair: Path, verb: str, option: str) -> None:
    assert child("killed", verb, pair, option) > 40


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_fault_34_asked_to_stop_it_leaves_nothing(model, number: signal.Signals) -> None:
    source = model()
    with paused(source, source.parent / "target") as process:
        assert (source.parent / ".target.partial" / "model").exists()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr
    assert sorted(p.name for p in source.parent.iterdir()) == ["hf"]


@contextmanager
def paused(source: Path, target: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """`bevatron import`, halted after the weights until a line is written to it."""
    code = (
        "import sys\n"
        "from bevatron.bridge import import_hf\n"
        "from bevatron.cli.main import main\n"
        "copy = import_hf._copy_others\n"
        "def halt(*args):\n"
        "    print('halted', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    copy(*args)\n"
        "import_hf._copy_others = halt\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "import", str(source), str(target), *flags]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "halted\n"
            yield process
        finally:
            process.kill()


# --- at the same time ----------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_fault_37_the_second_of_two_is_told_who_is_first(model, overwrite: bool) -> None:
    source = model()
    target = source.parent / "target"
    flags = ["--overwrite"] if overwrite else []
    if overwrite:
        target.mkdir()
        (target / "old").write_text("x")
    with paused(source, target, *flags) as process:
        with pytest.raises(BevatronError, match=rf"being written by process {process.pid} on "):
            import_checkpoint(source, target, overwrite=overwrite)
        assert overwrite == (target / "old").exists()
        _, stderr = process.communicate("go on\n", timeout=600)
    assert (process.returncode, stderr) == (0, "")
    assert sorted(p.name for p in source.parent.iterdir()) == ["hf", "target"]
    export_checkpoint(target, source.parent / "out")
    assert_same_folder(source, source.parent / "out")


@pytest.mark.parametrize(("verb", "option"), OFTEN)
def test_fault_37_six_at_once_on_one_target(pair: Path, verb: str, option: str) -> None:
    assert child("race", verb, pair, option) == 25


def test_fault_37_without_locks_a_partial_folder_is_left_alone(model, monkeypatch) -> None:
    """On a filesystem without locks nobody knows whether another host is writing it."""

    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    source = model()
    partial = source.parent / ".target.partial"
    partial.mkdir()
    (partial / "theirs").write_text("x")
    refused(source, str(partial), "no locks")
    assert (partial / "theirs").exists()
    shutil.rmtree(partial)
    import_checkpoint(source, source.parent / "target")
    assert sorted(p.name for p in source.parent.iterdir()) == ["hf", "target"]


def test_fault_37_a_lock_that_was_just_removed_is_none(tmp_path: Path, monkeypatch) -> None:
    """Between opening and locking, its holder may remove it and a third make it anew."""
    real, path, times = fcntl.flock, tmp_path / ".target.lock", []

    def flock(fd: int, operation: int) -> None:
        times.append(fd)
        if len(times) < 3:
            path.unlink()
            path.touch()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with new_folder(tmp_path / "target", overwrite=False):
        assert len(times) == 3
        with path.open() as file, pytest.raises(BlockingIOError):
            real(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite_in_place(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def replace_by_another(path: Path) -> None:
    stat = path.stat()
    path.with_name("new").write_bytes(path.read_bytes())
    os.utime(path.with_name("new"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    path.with_name("new").rename(path)


CHANGES = [grow, shrink, overwrite_in_place, replace_by_another, Path.unlink]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", ["weights", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("verb", CALLS)
def test_fault_38_source_that_changes_while_it_is_read(
    model, monkeypatch, verb: str, which: str, change: Callable[[Path], None]
) -> None:
    """It changes after the first buffer has been read."""
    source = model("many")
    path = file_of(source, NORM) if which == "weights" else source / which
    call = CALLS[verb]
    if verb != "import":
        import_checkpoint(source, source.parent / "native")
        source = source.parent / "native"
        path = source / ("model/00001.safetensors" if which == "weights" else f"source/{which}")
    times = []

    @contextmanager
    def progress(title: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
        def advance(n: int) -> None:
            if not times:
                change(path)
            times.append(n)

        yield advance

    modules = {"import": import_hf, "export": convert, "prune": assemble}
    monkeypatch.setattr(modules[verb], "shown_progress", progress)
    before = sorted(source.parent.iterdir())
    with pytest.raises(BevatronError, match=r"changed while it was being read") as caught:
        call(source, source.parent / "target")
    assert str(path) in str(caught.value)
    assert sorted(source.parent.iterdir()) == before


def test_fault_38_writer_that_never_stops(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", dtype="bfloat16", vocab_size=1 << 18)
    stop, before = threading.Event(), (source / WEIGHTS).stat().st_size

    def write() -> None:
        fd = os.open(source / WEIGHTS, os.O_WRONLY)
        while not stop.wait(0.001):
            os.pwrite(fd, os.urandom(8), before - 8)
        os.close(fd)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with pytest.raises(BevatronError, match=rf"{WEIGHTS}: changed while it was being read"):
            import_checkpoint(source, tmp_path / "native")
    finally:
        stop.set()
        thread.join()
    assert not (tmp_path / "native").exists()
    import_checkpoint(source, tmp_path / "native")
    rewrite(source, lambda t: t[EMBED].zero_())
    with pytest.raises(BevatronError, match="already exists"):
        import_checkpoint(source, tmp_path / "native")
    old = contents(tmp_path / "native")
    import_checkpoint(source, tmp_path / "native", overwrite=True)
    assert contents(tmp_path / "native") != old
