"""A process of an engine: `python -m bevatron.generate.engine_worker PLAN RANK PORT PARENT`."""

from __future__ import annotations

import json
import sys

from bevatron.train.processes_and_signals import end_with_parent

if __name__ == "__main__":
    end_with_parent(int(sys.argv[4]))
    from bevatron.generate.engine_processes import Plan, work  # torch takes seconds

    work(Plan(**json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
