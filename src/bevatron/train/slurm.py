"""`bevatron launch slurm`: the batch script of a run that outlives time limits and failed machines.

One task per node runs `bevatron train --nproc G --nnodes N`, which is torchrun's agent; the agents
meet on the first node. Before the time limit Slurm signals the script, which passes the signal on:
the run saves, and the job is put back into the queue, to continue from the saved step. A job that
saved nothing is not put back, because the next one would end in the same way.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bevatron.checkpoint.run_folder import LATEST
from bevatron.errors import BevatronError

TIME = re.compile(r"(\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2})$")
WORD = re.compile(r"[\w.,:@/+=-]+$")


def script(
    config: Path,
    overrides: Sequence[str],
    *,
    nodes: int,
    gpus_per_node: int,
    nproc: int | None = None,
    time: str = "04:00:00",
    partition: str | None = None,
    account: str | None = None,
    name: str = "bevatron",
    signal_before_s: int = 120,
    max_restarts: int = 3,
    sbatch: Sequence[str] = (),
) -> str:
    """The text of the script, after checking the run's layout against `nodes` times `nproc`.

    Args:
        gpus_per_node: 0 for a run on CPUs.
        nproc: processes per node; one per GPU if absent.
        signal_before_s: how long before the time limit the run is asked to save: more than a step
            and a save take.
        sbatch: further options, such as `--exclusive`.
    Raises BevatronError if the run could not start on so many processes.
    """
    from bevatron.train.launch import prepared

    nproc = nproc or gpus_per_node
    if nproc < 1:
        raise BevatronError("--gpus-per-node 0 needs --nproc, the number of processes per node")
    if not TIME.fullmatch(time):
        raise BevatronError(f"--time {time!r}: expected minutes, HH:MM:SS or DAYS-HH:MM:SS")
    resolved, _ = prepared(config, list(overrides), nodes * nproc)
    options = {
        "job-name": name,
        "partition": partition,
        "account": account,
        "nodes": str(nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(gpus_per_node) if gpus_per_node else None,
        "time": time,
        "signal": f"B:USR1@{signal_before_s}",
        "open-mode": "append",
        "output": "%x-%j.out",
    }
    lines = [f"--{key}={value}" for key, value in options.items() if value is not None]
    lines += ["--requeue", *sbatch]
    for line in lines:
        if not WORD.match(line.replace("%", "_")):
            raise BevatronError(
                f"{line!r} cannot stand in an #SBATCH line; remove spaces or quotes"
            )
    train = [sys.executable, "-m", "bevatron", "train", str(config), *overrides]
    train += ["--nproc", str(nproc), "--max-restarts", str(max_restarts)]
    if nodes > 1:
        train += ["--nnodes", str(nodes)]
    command = shlex.join(train) + (' --rendezvous "$head:$port"' if nodes > 1 else "")
    return TEMPLATE.format(
        options="\n".join(f"#SBATCH {line}" for line in lines),
        folder=shlex.quote(str(Path.cwd())),
        latest=shlex.quote(str(Path(resolved.run.dir) / LATEST)),
        train=command,
    )


TEMPLATE = """\
#!/bin/bash
{options}

set -u
cd -- {folder} || exit 2

# Where the nodes meet: the first of them, at a port of this job's own.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
export PYTHONUNBUFFERED=1
# NCCL_SOCKET_IFNAME, NCCL_IB_HCA, HF_HOME and the like go here.

# Slurm's signal before the time limit comes to this shell alone; srun takes it to every node.
asked=0
signals=0
step=
pass_on() {{
  asked=1
  signals=$((signals + 1))
  kill -USR1 "$step" 2>/dev/null
}}
trap pass_on USR1
trap 'signals=$((signals + 1)); kill -TERM "$step" 2>/dev/null' TERM

# The newest saved step; nothing if there is none.
newest() {{ cat -- {latest} 2>/dev/null; }}
before=$(newest)

srun --kill-on-bad-exit=1 {train} &
step=$!
if [ "$asked" = 1 ]; then pass_on; fi
# A trapped signal ends `wait` with a status of its own, and not srun: ask again.
while :; do
  seen=$signals
  wait "$step"
  status=$?
  [ "$signals" = "$seen" ] && break
done

# A run that has reached its last step ends with 0; one that was asked to save does not. Only what
# was saved brings the next job further than this one.
if [ "$asked" = 1 ] && [ "$status" != 0 ]; then
  if [ "$(newest)" != "$before" ]; then
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "not requeued: this job has saved no step; see above, and give it more --time, a longer" \
      "--signal-before, or save more often (checkpoint.every)" >&2
  fi
fi
exit "$status"
"""
