"""The examples of docs/serve.md run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from bevatron.cli import main as cli
from tests.server.served import Served

TEXT = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()


def test_the_python_example_runs(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(code) == 1
    exec(compile(code[0].replace("http://127.0.0.1:8000", server.url), "serve.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_curl_example_runs(server: Served) -> None:
    found = re.search(r"^curl .*\n.*$", TEXT, re.MULTILINE)
    assert found is not None
    command = shlex.split(
        found[0].replace("\\\n", " ").replace("http://127.0.0.1:8000", server.url)
    )
    done = subprocess.run([command[0], "-sS", *command[1:]], capture_output=True, check=True)
    assert b'"text_completion"' in done.stdout


def test_every_option_is_one_of_the_command_s() -> None:
    import typer

    command = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"`(--[a-z0-9-]+)", TEXT)) <= known
    undocumented = {o for o in known if o.startswith("--")} - set(re.findall(r"--[a-z0-9-]+", TEXT))
    assert undocumented <= {"--help"}
