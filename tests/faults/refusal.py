"""What every refusal promises, and the tools to damage a model with."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.cli import main as cli
from bevatron.errors import BevatronError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
CALLS = {"import": import_checkpoint, "export": export_checkpoint}


def refused(source: Path, *words: str, verb: str = "import", **options: Any) -> str:
    """The message of the refusal, which has all `words`. Checks, in Python without a target and on
    the command line with one to replace: exit status 2, one line, nothing left at the target nor
    beside it, and the old target as it was."""
    target = source.parent / "target"
    before = sorted(source.parent.iterdir())
    with pytest.raises(BevatronError) as caught:
        CALLS[verb](source, target, **options)
    assert caught.value.exit_status == 2
    assert sorted(source.parent.iterdir()) == before
    target.mkdir()
    (target / "old").write_text("kept")
    flags = [f for k, v in options.items() for f in (f"--{k.replace('_', '-')}", str(v))]
    status, _, stderr = command(verb, source, target, "--overwrite", *flags)
    assert status == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n")
    assert "unexpected" not in stderr, "an error that nobody foresaw"
    assert len(stderr) < 3000 and stderr[:-1].isprintable()
    assert [(p.name, p.read_text()) for p in target.iterdir()] == [("old", "kept")]
    (target / "old").unlink()
    target.rmdir()
    assert sorted(source.parent.iterdir()) == before
    for word in words:
        assert word in str(caught.value)
        assert word in stderr
    return str(caught.value)


def command(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `bevatron ARGUMENTS`, run in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    err.reconfigure(errors="backslashreplace")  # as Python's own
    with (
        mock.patch.object(sys, "argv", ["bevatron", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as done,
    ):
        cli.main()
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read())
    return int(done.value.code or 0), texts[0], texts[1]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: path -> bytes, None for a folder."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def shard(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def put(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = shard(path)
    change(header)
    put(path, header, data)


def rename(path: Path, old: str, new: str) -> None:
    """Give a tensor of a safetensors file another name, at the same place."""
    change_header(path, lambda h: h.update({new: h.pop(old)}))


def change_index(source: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((source / INDEX).read_text())
    change(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


def file_of(source: Path, tensor: str) -> Path:
    """The weight file that holds a tensor."""
    if (source / WEIGHTS).exists():
        return source / WEIGHTS
    return source / json.loads((source / INDEX).read_text())["weight_map"][tensor]
