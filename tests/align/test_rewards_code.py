"""Code of a model runs where it can do no harm, and passes only if it is right: faults 81, 82, 84.

These tests run real programs under the kernel's own guards, and are skipped where there are none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bevatron.align import code_reward
from bevatron.align.code_reward import code_score, compared, program_of
from bevatron.align.locked_python import Limits, run_python
from bevatron.align.reward_config import Code, reward_of
from bevatron.align.rewards import Answer, Rewards
from bevatron.errors import BevatronError

LIMITS = Limits(seconds=120.0, memory=512 << 20)


def _locked() -> str | None:
    try:
        run_python("pass", LIMITS)
    except BevatronError as error:
        return str(error)
    return None


WHY = _locked()
locked = pytest.mark.skipif(WHY is not None, reason=WHY or "")


def graded(program: str, tests: Any, **keys: Any) -> float:
    config = reward_of({"name": "code", "seconds": 60.0, **keys})
    assert isinstance(config, Code)
    return code_score(config, {"tests": tests}, f"Here it is:\n```python\n{program}\n```\nDone.")


@locked
def test_programs_run() -> None:
    assert run_python("print(input()[::-1])", LIMITS, "abc\n").output == "cba\n"
    everything = "import heapq, json, re, decimal, dataclasses, threading, itertools\n"
    everything += "@dataclasses.dataclass\nclass A:\n    x: int = 1\n"
    everything += "t = threading.Thread(target=lambda: print(A()))\nt.start()\nt.join()"
    assert run_python(everything, LIMITS).output == "A(x=1)\n"
    assert run_python("raise ValueError('no')", LIMITS).error == "ValueError: no"
    assert run_python("import sys; sys.exit(3)", LIMITS).error == "exit status 3"
    assert run_python("open('f', 'w').write('a'); print(open('f').read())", LIMITS).output == "a\n"
    assert run_python("print(len(input()))", LIMITS, "x" * 300_000 + "\n").output == "300000\n"


@locked
@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("while True: pass", "takes more than 1 s"),  # fault 81
        ("import time; time.sleep(100)", "takes more than 1 s"),
        ("9**9**9**9", "takes more than 1 s"),
        ("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile 1: pass", "1 s"),
        ("print('a' * (5 << 20))", "writes more than 1 MiB"),
        ("while True: print('a' * 1000)", "writes more than 1 MiB"),
        ("import ctypes; ctypes.string_at(0)", "ends its process (signal 11)"),
    ],
)
def test_a_program_that_does_not_end_is_ended(program: str, said: str) -> None:
    ran = run_python(program, Limits(seconds=1.0))
    assert ran.stopped is not None and said in ran.stopped


@locked
@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",  # fault 82
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing as m; m.Process(target=print).start()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import socket; socket.create_connection(('127.0.0.1', 1))",
        "import socket; socket.socketpair()",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.setsid()",
        "x = 'a' * (3 << 30)",
        "open('big', 'wb').write(bytes(64 << 20))",
        "open({outside!r}, 'w')",
        "print(open({inside!r}).read())",
        "import os; os.chmod({inside!r}, 0)",
        "import os; os.unlink({inside!r})",
        "import os; os.rename({inside!r}, 'mine')",
        "import os; os.symlink({inside!r}, 'mine'); print(open('mine').read())",
        "import os; print(os.listdir({folder!r}))",
        "print(open('/proc/self/environ').read())",
        "import numpy",
    ],
)
def test_a_program_cannot_leave_its_folder(program: str, tmp_path: Path) -> None:
    inside = tmp_path / "secret"
    inside.write_text("secret")
    places = {"outside": str(tmp_path / "new"), "inside": str(inside), "folder": str(tmp_path)}
    for name, place in places.items():
        program = program.replace(f"{{{name}!r}}", repr(place))
    ran = run_python(program, LIMITS)
    assert not ran.fine and "secret" not in ran.output
    assert inside.read_text() == "secret" and [p.name for p in tmp_path.iterdir()] == ["secret"]


@locked
def test_correct_programs_pass_and_others_do_not() -> None:
    double = "def f(x):\n    return 2 * x"
    assert graded(double, ["assert f(2) == 4", "assert f('a') == 'aa'"]) == 1
    assert graded(double, ["assert f(2) == 4", "assert f(2) == 5"]) == 0
    assert graded(double, ["assert f(2) == 4", "assert f(2) == 5"], partial=True) == 0.5
    assert graded(double, "assert f(2) == 4\nassert abs(f(0.5) - 1) < 0.1") == 1
    assert graded("def f(x): return set(x)", ["assert f([1, 1]) == set([1])"]) == 1
    assert graded("def f(x): return x", ["assert f(1) == 1", "assert g(1)"]) == 0
    echo = [{"input": "3\n", "output": "6"}, {"input": "4", "output": "8\n"}]
    assert graded("print(2 * int(input()))", echo) == 1
    assert graded("print(6)", echo) == 0 and graded("print(6)", echo, partial=True) == 0.5
    assert graded("print(2 * int(input()))", '{"inputs": ["1"], "outputs": ["2"]}') == 1
    hangs = "def f(x):\n    while x == 1: pass\n    return x"
    tests = ["assert f(0) == 0", "assert f(1) == 1", "assert f(2) == 2"]
    assert graded(hangs, tests, partial=True, seconds=3.0) == pytest.approx(2 / 3)


@locked
@pytest.mark.parametrize(
    "program",
    [
        "class A:\n    def __eq__(self, o): return True\ndef f(x): return A()",
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "print('ok'); print('1 passed'); print('{\"value\": \"4\"}')",
        'import os\nfor fd in range(3, 20):\n    try: os.write(fd, b\'{"value": "4"}\\n\' * 9)\n'
        "    except OSError: pass",
        "import builtins\nbuiltins.AssertionError = Exception\ndef f(x): return 5",
        'import json\njson.dumps = lambda *a, **k: \'{"value": "5"}\'\ndef f(x): return 5',
        "class A:\n    def __repr__(self): return '*'\ndef f(x): return A()",
        "import sys\ndef f(x):\n    return str(sys._getframe(1).f_locals)",
    ],
)
def test_a_program_that_imitates_the_checker_fails(program: str) -> None:
    """Fault 84."""
    assert graded(program, ["assert f(2) == 4"]) == 0


@locked
def test_output_that_imitates_the_checker_fails() -> None:
    tests = [{"input": "2", "output": "4"}]
    for program in (
        "print('4', 'passed')",
        "import os; os._exit(0)",
        "print(4); raise SystemExit(1)",
    ):
        assert graded(program, tests) == 0


def test_the_program_is_the_last_block_after_the_thoughts() -> None:
    assert program_of("<think>```python\na\n```</think>```\nb\n```") == "b"
    assert program_of("```python\na\n```\nor\n```py\nb\nc\n```") == "b\nc"
    assert program_of("print(1)") == "print(1)"
    assert program_of("```python\nunclosed") == "unclosed"


def test_tests_that_cannot_be_understood_are_refused() -> None:
    for given in ([], 3, [1], [{"input": "a"}], {"inputs": [], "outputs": []}):
        with pytest.raises(BevatronError, match="the tests are neither"):
            code_reward.tests_of(given)
    with pytest.raises(BevatronError, match="fn_name"):
        code_reward.tests_of({"inputs": [[1]], "outputs": [1], "fn_name": "f"})
    assert compared("assert f(1) == [1, {'a': None}]") == ("f(1)", [1, {"a": None}])
    assert compared("assert f(1) is True") == ("f(1)", True)
    for other in ("assert f(1) == x", "assert f(1)", "f(1) == 2", "assert f(1) < 2 < 3", "("):
        assert compared(other) is None


@locked
def test_code_is_a_reward_like_others() -> None:
    reward = reward_of({"name": "code", "seconds": 3.0, "processes": 2})
    row = {"tests": ["assert f(1) == 2"]}
    texts = ["def f(x): return x + 1", "def f(x): return x", "while True: pass"]
    with Rewards.open([reward]) as made:
        found = made.score([Answer(row, "q", text, [1], True) for text in texts])
        assert found[:, 0].tolist() == [1, 0, 0] and made.notes() == []
