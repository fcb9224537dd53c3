"""vLLM and llama.cpp are run on exports of every family, of pruned models and of models whose
layers differ, and do what the readers' table says of each: Bevatron's greedy tokens, or not.

`make test-readers` makes their environments and runs this."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.readers.exports import CASES, COUNT, PROMPT, Export, exported, make
from tests.real import smollm2

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
VLLM, LLAMA_CPP = ROOT / ".venv-vllm", ROOT / ".venv-llama-cpp"
TIMEOUT_S = 1800
pytestmark = pytest.mark.slow


def needs(environment: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (environment / "ready").exists(),
        reason=f"{environment.name}/ready is missing; `make test-readers` makes it, where it can",
    )


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    root = tmp_path_factory.mktemp("exports")
    made = {name: make(case, root / name) for name, case in CASES.items()}
    with contextlib.suppress(smollm2.Unavailable):
        made["smollm2"] = exported(smollm2.folder(), root / "smollm2")
    close = {name: export.margin for name, export in made.items() if export.margin < 1e-3}
    assert not close, "these have second choices that are as good"
    return made


def test_every_kind_of_answer_is_predicted_somewhere(exports: dict[str, Export]) -> None:
    for reader in ("vLLM", "llama.cpp"):
        said = [export.predicted[reader] for export in exports.values()]
        assert sum(s.startswith("no: ") for s in said) >= 3
        assert sum(s.startswith("yes") for s in said) >= 10


@needs(VLLM)
def test_vllm_does_what_the_table_says(exports: dict[str, Export]) -> None:
    folders = {name: str(export.folder) for name, export in exports.items()}
    found: dict[str, dict[str, Any]] = {}
    while len(found) < len(folders):
        rest = {name: folder for name, folder in folders.items() if name not in found}
        job = {"folders": rest, "prompt": PROMPT, "count": COUNT}
        before = len(found)
        found |= {said["name"]: said for said in answers(VLLM, "run_vllm.py", job)}
        if len(found) == before:  # the process died without a word
            name = next(iter(rest))
            found[name] = {"name": name, "error": "it died"}
    check("vLLM", exports, found)


@needs(LLAMA_CPP)
def test_llama_cpp_does_what_the_table_says(exports: dict[str, Export]) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is missing")
    job = {"folders": {name: str(export.folder) for name, export in exports.items()}}
    source = str(LLAMA_CPP / "source" / "llama.cpp")
    found = {said["name"]: said for said in answers(LLAMA_CPP, "run_converter.py", job, source)}
    for name, said in found.items():
        if "file" not in said:
            continue
        ids = map(str, [COUNT, *PROMPT])
        done = subprocess.run(
            [node, str(HERE / "run_llama_cpp.mjs"), said["file"], *ids],
            cwd=LLAMA_CPP,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
        if done.returncode == 0:
            found[name] |= json.loads(done.stdout.splitlines()[-1])
        else:
            found[name]["error"] = next(iter(done.stderr.splitlines()), f"rc {done.returncode}")
    check("llama.cpp", exports, found)


def answers(environment: Path, script: str, job: dict[str, Any], *more: str) -> Iterator[Any]:
    """The lines of JSON that a script of this folder prints in an environment."""
    done = subprocess.run(
        [str(environment / "bin" / "python"), str(HERE / script), *more],
        input=json.dumps(job),
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    for line in done.stdout.splitlines():
        if line.startswith('{"name"'):
            yield json.loads(line)


def check(reader: str, exports: dict[str, Export], found: dict[str, dict[str, Any]]) -> None:
    """Every export is read with Bevatron's tokens or not read, as predicted. Shows the table."""
    wrong = []
    for name, export in exports.items():
        said, predicted = found[name], export.predicted[reader]
        equal = said.get("tokens") == export.tokens
        happened = "equal" if equal else said.get("error") or "other tokens"
        print(f"{reader:10} {name:32} {happened[:90]:90} | predicted {predicted}")
        if equal == predicted.startswith("no: "):
            wrong.append(name)
    assert not wrong, f"{reader}: the table is wrong about {', '.join(wrong)}"
