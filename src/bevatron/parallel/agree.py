"""Doing something on every rank and agreeing on how it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from bevatron.errors import BevatronError

T = TypeVar("T")


def on_all(act: Callable[[], T]) -> list[T]:
    """Run `act` on every rank and return all results, by rank.

    If it fails on any rank with bad input or a file system error, all ranks raise that rank's
    message: none goes on alone into a collective that the others will never join."""
    result: T | None = None
    failure: str | None = None
    try:
        result = act()
    except BevatronError as error:
        failure = str(error)
    except OSError as error:
        failure = f"{error.filename or 'input/output'}: {error.strerror or error}"
    outcomes: list[tuple[T | None, str | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, failure))
    for _, message in outcomes:
        if message is not None:
            raise BevatronError(message)
    return [value for value, _ in outcomes]  # type: ignore[misc]
