"""`bevatron` with trouble: python -m tests.train.faulty WHAT RANK STEP train run.yaml ...

Started by torchrun, so that every rank is a process of its own.
"""

from __future__ import annotations

import sys

from bevatron.cli.main import main
from tests.train.small_run import troubled

if __name__ == "__main__":
    what, rank, step = sys.argv[1:4]
    sys.argv[1:4] = []
    with troubled((what, int(rank), int(step))):
        main()
