"""The batch script runs as it is: srun and scontrol are played by two small scripts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bevatron.cli.main import app
from bevatron.errors import BevatronError
from bevatron.train.slurm import script
from tests.train import small_run
from tests.train.test_life import Started

# Starts its command once per node and passes USR1 and TERM on to all, as srun does.
SRUN = """\
#!{python}
import os, signal, subprocess, sys
command = [a for a in sys.argv[1:] if not a.startswith("--kill")]
tasks = [subprocess.Popen(command) for _ in range({nodes})]
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda n, frame: [os.kill(t.pid, n) for t in tasks if t.poll() is None])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """\
#!/bin/bash
if [ "$1" = show ]; then echo localhost; echo localhost; else echo "$@" >>"$FOLDER/scontrol"; fi
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return small_run.make(tmp_path)


@pytest.fixture
def batch() -> Iterator[Callable[[Path], Started]]:
    """Starts a batch script as Slurm does."""
    started: list[Started] = []

    def begin(job: Path) -> Started:
        started.append(Started(job.parent, "bash", str(job)))
        return started[-1]

    yield begin
    for one in started:
        one.kill()


def make_script(config: Path, *overrides: str, nodes: int = 2) -> str:
    return script(config, overrides, nodes=nodes, gpus_per_node=0, nproc=1, max_restarts=0)


@pytest.mark.slow
def test_the_script_trains_on_two_nodes_saves_before_the_limit_and_requeues(
    config: Path, batch: Callable[[Path], Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = config.parent
    commands = folder / "bin"
    commands.mkdir()
    for name, text in (
        ("srun", SRUN.format(python=sys.executable, nodes=2)),
        ("scontrol", SCONTROL),
    ):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FOLDER", str(folder))
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    job = folder / "job.sh"

    job.write_text(make_script(config, "train.steps=100000"))
    run = batch(job)
    run.reach(5)
    run.process.send_signal(signal.SIGUSR1)
    said = run.end()
    assert run.process.returncode == 128 + signal.SIGUSR1, said
    assert "stopped by SIGUSR1 after step" in said and "Traceback" not in said
    assert (folder / "scontrol").read_text() == f"requeue {os.getpid()}\n"
    last = small_run.losses(folder / "run")[-1][0]
    assert (folder / "run" / "latest").read_text() == f"step-{last:08d}\n"

    job.write_text(make_script(config, f"train.steps={last + 2}"))
    run = batch(job)
    said = run.end()
    assert run.process.returncode == 0, said
    assert [s for s, *_ in small_run.losses(folder / "run")] == list(range(1, last + 3))
    assert (folder / "scontrol").read_text().count("requeue") == 1, "a finished run is not requeued"


def test_the_script_is_valid_whatever_its_words_hold(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quotes, spaces, dollars and newlines arrive in the command as they are."""
    odd = "run.dir=a 'b' \"c\" $HOME `id`\n;d"
    spaced = tmp_path / "my 'runs' $x"
    spaced.mkdir()
    monkeypatch.chdir(spaced)
    text = make_script(config, odd)
    checked = subprocess.run(
        ["bash", "-n"], input=text, text=True, capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    argv = tmp_path / "argv"
    fake = f'srun() {{ printf \'%s\\0\' "$PWD" "$@" >{argv}; }}; scontrol() {{ echo node1; }}\n'
    job = text.replace("set -u\n", f"{fake}set -u\nSLURM_JOB_ID=7 SLURM_JOB_NODELIST=n\n")
    subprocess.run(["bash"], input=job, text=True, check=True, timeout=600)
    said = argv.read_text().split("\0")
    assert said[0] == str(spaced)
    assert odd in said
    assert said[said.index("--rendezvous") + 1] == "node1:20007"


# Asks the script to save as Slurm does, and plays a run that then does `{then}` and ends.
ASKED = """\
srun() {{ trap '{then}; exit {status}' USR1; kill -USR1 $$; while :; do sleep 0.05; done; }}
scontrol() {{ [ "$1" = show ] && echo node1 || echo "$@" >>scontrol; }}
"""


@pytest.mark.parametrize(
    ("then", "status", "requeued"),
    [
        ("echo step-2 >run/latest", 138, True),
        ("echo step-2 >run/latest", 137, True),  # saved, but cut short later
        ("echo step-2 >run/latest", 0, False),
        (":", 138, False),  # the time limit is shorter than the way to the first step
        (":", 2, False),  # the save fails every time
    ],
)
def test_a_job_that_saved_nothing_is_not_requeued(
    config: Path, monkeypatch: pytest.MonkeyPatch, then: str, status: int, requeued: bool
) -> None:
    monkeypatch.chdir(config.parent)
    Path("run").mkdir()
    Path("run/latest").write_text("step-1\n")
    played = ASKED.format(then=then, status=status)
    job = make_script(config, "run.dir=run").replace(
        "set -u\n", f"{played}set -u\nSLURM_JOB_ID=7 SLURM_JOB_NODELIST=n\n"
    )
    done = subprocess.run(["bash"], input=job, text=True, capture_output=True, check=False)
    assert done.returncode == status, done.stderr
    assert Path("scontrol").exists() == requeued
    assert ("not requeued: this job has saved no step" in done.stderr) == (then == ":")


def test_the_run_is_checked_before(config: Path) -> None:
    with pytest.raises(BevatronError, match="tp=3 does not divide"):
        script(config, ["parallel.tp=3"], nodes=3, gpus_per_node=8)
    with pytest.raises(BevatronError, match="multiple of 16"):
        script(config, ["parallel.tp=4", "parallel.pp=4"], nodes=1, gpus_per_node=8)
    with pytest.raises(BevatronError, match="HH:MM:SS"):
        script(config, [], nodes=1, gpus_per_node=1, time="4h")
    with pytest.raises(BevatronError, match="#SBATCH"):
        script(config, [], nodes=1, gpus_per_node=1, sbatch=["--comment=a b\n#SBATCH --x"])


def test_the_command_writes_it(config: Path, tmp_path: Path) -> None:
    arguments = ["launch", "slurm", str(config), "--nodes", "2", "--gpus-per-node", "2"]
    arguments += ["--time", "1-00:00:00", "--partition", "p", "--account", "a"]
    arguments += [
        "--signal-before",
        "300",
        "--sbatch=--exclusive",
        "--output",
        str(tmp_path / "job"),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "job").read_text().splitlines()
    written = {line.removeprefix("#SBATCH --") for line in lines}
    assert written >= {"nodes=2", "ntasks-per-node=1", "gpus-per-node=2", "time=1-00:00:00"}
    assert written >= {"partition=p", "account=a", "signal=B:USR1@300", "requeue", "exclusive"}
