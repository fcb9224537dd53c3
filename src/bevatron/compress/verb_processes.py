"""One rank of a verb that runs alone, starts processes of its own, or is one of torchrun's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bevatron.parallel.on_all_ranks import on_all
from bevatron.parallel.process_groups import world
from bevatron.train.hardware import training_device, tune_allocator
from bevatron.train.run_processes import reporting
from bevatron.train.stop_signals import Stopping


@contextmanager
def one_rank(worker: bool, device_kind: str | None = None) -> Iterator[torch.device]:
    """The process group for the duration; yields this rank's device, of the kind given, as
    `train.device`. A `worker` of a launcher leaves its last words if it fails, and ends here if it
    does not."""
    stopping = Stopping()
    # Reports twice: of what fails inside the group before an end of the group that might hang.
    with reporting(worker, stopping):
        device = training_device(device_kind)
        if device.type == "cpu":
            tune_allocator()
        with world(device), reporting(worker, stopping):
            yield device
            if worker:
                # Leave together and without destructors, as `train` does.
                on_all(lambda: None)
                sys.stdout.flush()
                os._exit(0)
