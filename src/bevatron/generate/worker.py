"""`python -m bevatron.generate.worker PLAN RANK PORT`: one of an engine's other processes."""

from __future__ import annotations

import json
import sys

from bevatron.generate.workers import Plan, work
from bevatron.train.stopping import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    work(Plan(**json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
