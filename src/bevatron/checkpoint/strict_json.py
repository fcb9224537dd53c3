"""JSON from strangers: strict, with errors that name the file and the place.

Python's json module accepts duplicate keys (the last one wins), NaN and Infinity, and raises
RecursionError at deep nesting. Two readers of such a file may disagree, so it is refused here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bevatron.errors import CheckpointError

SIZE_LIMIT = 256 << 20  # an index of a very large model takes some 100 KB


def parse(data: bytes, where: str) -> Any:
    """Parse UTF-8 JSON. `where` begins every message. Raises CheckpointError."""
    if data.startswith(b"\xef\xbb\xbf"):
        raise CheckpointError(
            f"{where}: begins with a byte order mark, which JSON forbids; save it as plain UTF-8"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}") from error
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg})"
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: nested too deeply to be genuine") from error
    except ValueError as error:  # from the hooks, and integers of thousands of digits
        raise CheckpointError(f"{where}: {error}") from error


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """`parse`, and the outermost value must be an object."""
    value = parse(data, where)
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where}: holds a JSON {type(value).__name__}, expected an object {{...}}"
        )
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read and parse a file that holds one JSON object. Raises CheckpointError."""
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes are too much for JSON; expected at most "
                f"{SIZE_LIMIT}"
            )
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_object(data, str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:200]!r} appears twice; keep one of them")
            seen.add(key)
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"holds {name}, which is not JSON; write a number or null")
