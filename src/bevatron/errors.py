"""The two ways a command fails. Both end as one message on stderr, never as a traceback."""

from __future__ import annotations


class BevatronError(Exception):
    """Bad usage or bad input (exit status 2). The message says what, where, and what to do."""

    exit_status = 2


class CheckFailed(BevatronError):
    """A check that ran and did not pass, such as `verify` (exit status 1)."""

    exit_status = 1
