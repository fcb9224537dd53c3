"""The program that renders chat templates, which are somebody else's programs.

`template_process.py` runs this file by its path, as a process of its own that imports nothing but
jinja2, and sends it one request after another: each request and each answer is JSON behind its
length (8 bytes) on file descriptor 0, which is one end of a socket. Templates see what
transformers' `apply_chat_template` gives them, except what hands out more than plain data.

jinja2's sandbox keeps a template away from Python's internals. It cannot stop an endless loop or a
single large C call (`'a' * 10**10`), so the kernel does: a timer of processor time ends the
process, and its address space may grow only by a fixed amount per request. Before the first request
the process gives up what it does not need: files, child processes, new privileges, and root's
rights if it has them.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path[:0] = sys.argv[1:]  # where jinja2 lies

import ctypes
import html  # noqa: F401 (as are others below: files are shut when templates need them)
import json
import os
import pprint  # noqa: F401
import re
import resource
import signal
import textwrap  # noqa: F401
import unicodedata  # noqa: F401
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import TemplateSyntaxError, ext, meta, nodes, utils
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SPAN = 16  # characters that a span of an answer counts as
NOBODY = 65534
WIDEST_FORM = 200
PR_SET_NO_NEW_PRIVS = 38
WARM_UP = (
    "{% generation %}{{ '\\n' ~ x | tojson(indent=1) }}{% endgeneration %}{{ strftime_now('%Y') }}"
)
FILES = (nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.Block)


def main() -> None:
    _answer(
        WARM_UP, {"x": {}}, Page(1000, "2026-01-01")
    )  # what is imported late is, before files are shut
    sizes = os.open("/proc/self/statm", os.O_RDONLY) if sys.platform == "linux" else None
    _give_away()
    _send({"limits_memory": sizes is not None})
    while (data := _receive()) is not None:
        request = json.loads(data)
        limits = request["limits"]
        _limit_memory(sizes, limits["memory"] + limits["memory_per_byte"] * len(data))
        signal.setitimer(signal.ITIMER_PROF, limits["seconds"])
        most = limits["characters"] + limits["characters_per_byte"] * len(data)
        source, variables = request["source"], request["variables"]
        if request["cuts"] is None:
            answer = _answer(source, variables, Page(most, request["now"]))
        else:
            answer = _cut_answers(source, variables, request["cuts"], most, request["now"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        _limit_memory(None)
        _send(answer)


def _answer(source: str, variables: dict[str, Any] | None, page: Page) -> dict[str, Any]:
    """What a template gives for variables; its outline if those are None; or what is wrong."""
    global PAGE  # noqa: PLW0603 (templates call functions that know of no page)
    PAGE = page
    try:
        if variables is None:
            return _outline(source)
        for piece in _compiled(source).generate(variables):
            page.add(piece)
        return {"text": "".join(page.pieces), "spans": page.spans}
    except Refused as error:
        said = str(error)
    except MemoryError:
        return {"error": "takes more memory than a chat can need; stopped", "exhausted": True}
    except RecursionError:
        said = "nests too deeply"
    except TemplateSyntaxError as error:
        said = f"has a mistake in line {error.lineno}: {error.message}"
    except Exception as error:
        said = f"fails: {str(error) or type(error).__name__}"
    return {"error": said[:1000]}


def _cut_answers(
    source: str, variables: dict[str, Any], cuts: list[list[int]], most: int, now: str
) -> dict[str, Any]:
    """What a template gives for beginnings of a conversation: (messages, whether the next answer is
    asked for). Or what is wrong with the first that has no text."""
    answers = []
    for messages, asked in cuts:
        begun = {"messages": variables["messages"][:messages], "add_generation_prompt": bool(asked)}
        answer = _answer(source, variables | begun, Page(most, now))
        if "error" in answer:
            return answer
        answers.append(answer)
    return {"answers": answers}


class Refused(Exception):
    """The template does what none may, or says that it cannot do with these messages."""


class Page:
    """What a rendering has written, of so many characters at the most."""

    def __init__(self, most: int, now: str) -> None:
        self.pieces: list[str] = []
        self.spans: list[tuple[int, int]] = []
        self.length, self.left, self.now = 0, most, now

    def add(self, piece: str) -> None:
        self.count(len(piece))
        self.pieces.append(piece)
        self.length += len(piece)

    def count(self, characters: int) -> None:
        self.left -= characters
        if self.left < 0:
            raise Refused("builds more text than a chat can have; stopped")


PAGE = Page(0, "")  # the present one


# --- the template's world


class Sandbox(ImmutableSandboxedEnvironment):
    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Nothing gives bytes: values are what JSON has."""
        return attr not in ("encode", "to_bytes") and super().is_safe_attribute(obj, attr, value)

    def handle_exception(self, source: str | None = None) -> NoReturn:
        """An error as it is; jinja2 makes up a traceback, which nobody sees."""
        raise sys.exception() or RuntimeError


class Generation(ext.Extension):
    """`{% generation %}`, which marks what the model is to say."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        text = caller()
        PAGE.count(SPAN)
        PAGE.spans.append((PAGE.length, PAGE.length + len(text)))
        return text


class Dict:
    """`dict`, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Namespace(utils.Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        """`namespace(self=...)` is a name like others."""
        utils.Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise Refused(f"sets {name!r} on a namespace, which is not allowed")
        super().__setitem__(name, value)


def raise_exception(message: Any) -> None:
    raise Refused(f"refuses this: {message}")


def strftime_now(form: str) -> str:
    if re.search(r"%[^a-zA-Z%]*\d", form) or len(form) > WIDEST_FORM:
        raise Refused("formats the time with an absurd width; stopped")
    return datetime.fromisoformat(PAGE.now).strftime(form)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers', not as jinja2's, which escapes what HTML would misread."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


# Blocks are trimmed as transformers does it.
ENVIRONMENT = Sandbox(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
)
ENVIRONMENT.filters["tojson"] = tojson
del ENVIRONMENT.filters["random"], ENVIRONMENT.globals["lipsum"]  # the same chat, the same text
ENVIRONMENT.globals["raise_exception"] = raise_exception
ENVIRONMENT.globals["strftime_now"] = strftime_now
ENVIRONMENT.globals["dict"] = Dict()
ENVIRONMENT.globals["namespace"] = Namespace


def _parsed(source: str) -> nodes.Template:
    try:
        tree = ENVIRONMENT.parse(source)
    except RecursionError:
        raise Refused("cannot be parsed: it nests too deeply") from None
    for node in tree.find_all(FILES):
        kind = type(node).__name__.lower()
        raise Refused(f"uses {kind!r} in line {node.lineno}; a chat template is one file")
    return tree


def _outline(source: str) -> dict[str, Any]:
    tree = _parsed(source)
    literals = [node.data for node in tree.find_all(nodes.TemplateData)]
    literals += [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]
    try:
        variables = sorted(meta.find_undeclared_variables(tree))
    except (TemplateSyntaxError, RecursionError):  # which rendering will name
        variables = ["tools"] if "tools" in source else []
    return {"literals": literals, "variables": variables}


@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    return ENVIRONMENT.from_string(_parsed(source))


# --- the process


def _give_away() -> None:
    """Privileges, as far as this system lets go of them."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # who started this may have ignored it
    os.chdir("/")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(limit, (most, most))
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # what is open stays so
    if os.getuid() == 0:
        with suppress(OSError):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _limit_memory(sizes: int | None, more: int = 0) -> None:
    """Let the address space grow by `more` bytes from now on. `sizes` is the file that says how
    large it is; no limit without it."""
    limit = resource.RLIM_INFINITY
    if sizes is not None:
        limit = int(os.pread(sizes, 64, 0).split()[0]) * resource.getpagesize() + more
    with suppress(OSError, ValueError):  # macOS does not know this limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _receive() -> bytes | None:
    """The next request, or None when the other side is gone."""
    head = _exactly(8)
    return _exactly(int.from_bytes(head, "big")) if head else None


def _exactly(size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = os.read(0, min(size - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _send(answer: dict[str, Any]) -> None:
    data = json.dumps(answer).encode()
    left = memoryview(len(data).to_bytes(8, "big") + data)
    while left:
        left = left[os.write(0, left) :]


if __name__ == "__main__":
    main()
