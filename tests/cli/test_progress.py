"""What takes long says how far it is: lines where they are kept, bars on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.train import small_run

SCRIPT = """
import sys, time
from bevatron import progress as p
p.QUIET_S, p.LINE_EVERY_S = float(sys.argv[1]), 0.05
now = 0.0
time.monotonic = lambda: now  # this machine takes exactly so long
with p.progress("training", total=100, unit="steps", done=90) as advance:
    for i in range(10):
        now += 0.03
        advance(1, loss=f"{3 - i / 10:.2f}")
"""


def _progress(quiet: float) -> str:
    command = [sys.executable, "-c", SCRIPT, str(quiet)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_progress_lines_say_how_far_how_long_and_what_and_nothing_of_short_work() -> None:
    lines = _progress(0.1).splitlines()
    assert 2 <= len(lines) <= 7
    assert lines[0].startswith("training: 9") and " to go  loss " in lines[0]
    assert lines[-1].startswith("training: 100 of 100 (100%)") and lines[-1].endswith("loss 2.10")
    assert _progress(2.0) == ""


RUN_AND_RESUME = """
import sys
from bevatron import progress as p
from bevatron.cli.main import main
p.QUIET_S = p.LINE_EVERY_S = 0
config = sys.argv[1]
for steps in (2, 3):
    often = ["train.val_every=1", "train.val_batches=1"]
    sys.argv = ["bevatron", "train", config, f"train.steps={steps}", *often]
    try:
        main()
    except SystemExit as left:
        assert not left.code, left.code
"""


def test_loading_saving_and_validating_show_how_far_they_are(tmp_path: Path) -> None:
    config = small_run.make(tmp_path)
    command = [sys.executable, "-c", RUN_AND_RESUME, str(config)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    first, _, resumed = said.partition("step 2 is in")
    for text in (r"^validating: 1 of 1 ", r"^saving step 2: 0 MB of 0 MB", r"^training: 1 of 2 "):
        assert re.search(text, first, re.M), said
    assert not re.search(r"^loading|^checking", first, re.M)
    for text in (r"^checking step-00000002: 0 MB of", r"^loading weights: ",
                 r"^loading the optimizer: "):  # fmt: skip
        assert re.search(text, resumed, re.M), said


NESTED = """
from bevatron import progress as p
p.QUIET_S = 0
with p.progress("outer", total=4, unit="steps") as outer:
    for i in range(2):
        outer(1, loss=i)
        with p.progress("inner", total=2) as inner:
            inner()
            p._screens[0].live.refresh()  # which a thread does four times a second
            inner()
        outer()
"""


def test_on_a_terminal_bars_stand_below_one_another() -> None:
    seen = b""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", NESTED])
    with suppress(OSError):  # how the end of the other side is said
        while data := os.read(terminal, 4096):
            seen += data
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0, seen.decode()
    text = seen.decode()
    assert "outer" in text and "inner" in text and "loss 1" in text and "Error" not in text
