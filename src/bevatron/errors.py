"""The three ways a command fails. All end as one message on stderr, and none shows a traceback
unless BEVATRON_TRACEBACK asks for it."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

TRACEBACK = "BEVATRON_TRACEBACK"


class BevatronError(Exception):
    """Bad usage or bad input (exit status 2). The message says what, where, and what to do."""

    exit_status = 2


class CheckpointError(BevatronError):
    """A checkpoint or one of its files that is missing, incomplete, damaged or of another format
    version."""


class CheckFailed(BevatronError):
    """A check that ran and did not pass, such as `verify` (exit status 1)."""

    exit_status = 1


class UnexpectedError(BevatronError):
    """What nobody foresaw: a fault of this program, or of what it runs on (exit status 70, which
    sysexits.h calls EX_SOFTWARE)."""

    exit_status = 70


def failure(error: BaseException) -> BevatronError:
    """Any error as one that a command may end with. Those that were foreseen say what to do; others
    become one line that says where it happened, and with BEVATRON_TRACEBACK=1 the traceback."""
    if isinstance(error, BevatronError):
        return error
    if isinstance(error, OSError):
        return BevatronError(f"{error.filename or 'input/output'}: {error.strerror or error}")
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    first = (str(error).strip().splitlines() or [""])[0]
    said = f"unexpected {type(error).__name__}{where}: {first}".removesuffix(": ")
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        return UnexpectedError(f"{said}\n{''.join(traceback.format_exception(error)).rstrip()}")
    return UnexpectedError(f"{said} (set {TRACEBACK}=1 to see where it came from)")


def failed(message: str, status: int) -> BevatronError:
    """The error of another process, from its message and exit status (below 0: the signal that
    ended it)."""
    kinds = {1: CheckFailed, 2: BevatronError}
    return kinds.get(status, UnexpectedError)(message)
