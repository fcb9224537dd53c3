"""The program in which a reward is computed, so that it can be stopped: `rewards.py` starts it.

It loads one reward, says whether it could, and then scores one call after another. Requests and
replies are JSON behind its length (8 bytes) on a socket. A call's memory is limited by the kernel,
its clock is watched by the parent. It ends when its parent does: a thread looks for that, and a
timer of processor time ends what holds Python up.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bevatron.align.reward_config import PythonReward, reward_of
from bevatron.align.scorers import Asked, scorer_of
from bevatron.errors import BevatronError

SPARE = 5.0  # seconds of the processor beyond the clock's, on each core
LARGEST = 1e9  # reward; squares of sums of them are finite
LONGEST = 300  # characters of an error


class Misshapen(Exception):
    """A function returns something else than one reward per completion."""


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    given = json.loads(_receive(connection) or b"{}")
    try:
        if given["name"] == "environment":
            config = PythonReward.model_validate(given)
            score = _environment(config)
        else:
            config = reward_of(given)
            score = _function(config) if isinstance(config, PythonReward) else _each(config)
    except Exception as error:
        _send(connection, {"error": _said(error)})
        return
    _send(connection, {"ready": True})
    cores = os.cpu_count() or 1
    while (data := _receive(connection)) is not None:
        signal.setitimer(signal.ITIMER_PROF, (config.seconds + SPARE) * cores)
        _limit_memory(int(config.memory_gib * (1 << 30)))
        try:
            reply: dict[str, Any] = {"scores": score([Asked(**each) for each in json.loads(data)])}
        except MemoryError:
            reply = {"error": f"takes more than {config.memory_gib:g} GiB of memory", "full": True}
        except Misshapen as error:
            reply = {"error": str(error), "misshapen": True}
        except BevatronError as error:
            reply = {"error": f"fails: {_said(error)}"}
        except Exception as error:
            reply = {"error": _said(error)}
        except SystemExit as error:
            reply = {"error": f"calls exit({error.code})"}
        _limit_memory(None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(connection, reply)


def _each(config: Any) -> Callable[[Sequence[Asked]], list[Any]]:
    one = scorer_of(config)
    return lambda asked: [_number(one(each)) for each in asked]


def _environment(config: PythonReward) -> Callable[[Sequence[Asked]], list[Any]]:
    """The user's reply(row, messages), of one conversation at a time."""
    function = _loaded(config)

    def reply(asked: Sequence[Asked]) -> list[Any]:
        return [_messages(function(dict(each.row), list(each.prompt))) for each in asked]

    return reply


def _messages(found: Any) -> Any:
    """As JSON has them: what is none as its description."""
    if found is None:
        return None
    good = isinstance(found, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in found
    )
    return found if good else f"returns {_short(repr(found))}, expected a list of messages or None"


def _loaded(config: PythonReward) -> Callable[..., Any]:
    """The user's function. Raises BevatronError if there is none in the file."""
    path = Path(config.path)
    if not path.is_file():
        raise BevatronError(f"{path}: there is no such file")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    function = getattr(module, config.function, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise BevatronError(
            f"{path}: has no function {config.function!r}; it has {', '.join(known) or 'none'}"
        )
    loaded: Callable[..., Any] = function
    return loaded


def _function(config: PythonReward) -> Callable[[Sequence[Asked]], list[Any]]:
    """The user's reward."""
    function = _loaded(config)

    def score(asked: Sequence[Asked]) -> list[Any]:
        names = dict.fromkeys(name for each in asked for name in each.row)
        taken = ("prompts", "completions", "completion_ids", "prompt")
        columns = {n: [each.row.get(n) for each in asked] for n in names if n not in taken}
        completions: list[Any] = [
            each.text
            if isinstance(each.prompt, str)
            else list(each.messages or [{"role": "assistant", "content": each.text}])
            for each in asked
        ]
        found = function(
            prompts=[each.prompt for each in asked],
            completions=completions,
            completion_ids=[list(each.ids) for each in asked],
            **columns,
        )
        try:
            found = list(found)
        except TypeError:
            what = type(found).__name__
            raise Misshapen(f"returns a {what}, expected a list of numbers") from None
        if len(found) != len(asked):
            raise Misshapen(f"returns {len(found)} rewards for {len(asked)} completions")
        return [_number(each) for each in found]

    return score


def _number(value: Any) -> float | str | None:
    """A score as JSON has it: what is none as its description."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return f"returns {_short(repr(value))}, which is no number"
    if math.isfinite(number) and abs(number) > LARGEST:
        return f"returns {number:g}, expected at most {LARGEST:g}"
    return number if math.isfinite(number) else f"returns {number}"


def _said(error: BaseException) -> str:
    if isinstance(error, BevatronError):
        return _short(str(error))
    line = ""
    trace = error.__traceback__
    while trace is not None:
        name = Path(trace.tb_frame.f_code.co_filename).name
        line, trace = f" at {name}:{trace.tb_lineno}", trace.tb_next
    return _short(f"raises {type(error).__name__}{line}: {error}")


def _short(text: str) -> str:
    flat = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return flat if len(flat) <= LONGEST else flat[:LONGEST] + "..."


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _limit_memory(more: int | None) -> None:
    """Let the address space grow by so many bytes from now on, where the kernel limits it."""
    limit = resource.RLIM_INFINITY
    if more is not None and sys.platform == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = now + more
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _receive(connection: socket.socket) -> bytes | None:
    head = _exactly(connection, 8)
    return _exactly(connection, int.from_bytes(head, "big")) if head else None


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(min(size - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _send(connection: socket.socket, reply: dict[str, Any]) -> None:
    data = json.dumps(reply).encode()
    connection.sendall(len(data).to_bytes(8, "big") + data)


if __name__ == "__main__":
    main()
