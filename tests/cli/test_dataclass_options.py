"""The command line follows from a dataclass, and the words for another process from its values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from bevatron.cli.dataclass_options import with_options
from bevatron.compress.verb_options import Measuring, Processes
from bevatron.option import Option, arguments


def halves(text: str) -> tuple[int, ...]:
    return tuple(int(word) // 2 for word in text.split("/"))


@dataclass(frozen=True)
class Base:
    count: Annotated[int, Option("How many.", min=1)]
    name: str | None = None


@dataclass(frozen=True)
class Asked(Base):
    words: Annotated[tuple[str, ...], Option("More.", words="key=value")] = ()
    files: Annotated[tuple[Path, ...], Option(name="--file")] = ()
    both: Annotated[tuple[int, ...], Option(read=halves, shown="8/4")] = (4, 2)
    sizes: Annotated[tuple[int, ...], Option(read=halves)] = ()
    long_one: Annotated[bool, Option("A flag.")] = False
    table: Annotated[dict[str, int], Option(of=Path, read=lambda p: {p.name: 1})] = field(
        default_factory=dict
    )


@pytest.fixture
def app() -> typer.Typer:
    found = typer.Typer()

    @found.command()
    @with_options
    def verb(place: Annotated[str, typer.Argument()], asked: Asked, more: bool = False) -> None:
        """What it does."""
        print(repr((place, asked, more)))

    return found


def test_defaults_are_the_dataclass_s_and_what_is_required_is_asked_for(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, ["here", "--count", "3"])
    assert done.output.strip() == repr(("here", Asked(3), False))
    for words in (["here"], ["here", "--count", "0"], ["--count", "3"]):
        assert CliRunner().invoke(app, words).exit_code == 2


def test_every_kind_of_field_is_read(app: typer.Typer) -> None:
    words = ["here", "a=1", "b=2", "--count", "3", "--name", "x", "--file", "p", "--file", "q"]
    words += ["--both", "6/2", "--sizes", "2/4/6", "--long-one", "--table", "t", "--more"]
    wanted = Asked(
        3, "x", ("a=1", "b=2"), (Path("p"), Path("q")), (3, 1), (1, 2, 3), True, {"t": 1}
    )
    done = CliRunner().invoke(app, words)
    assert done.output.strip() == repr(("here", wanted, True))


def test_the_help_is_made_of_the_fields(app: typer.Typer) -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "What it does." in shown and "key=value" in shown
    assert "How many." in shown and "8/4" in shown
    assert "--no-long-one" not in shown


def test_options_go_to_another_process_as_they_came() -> None:
    found: list[tuple[Measuring, Processes]] = []
    app = typer.Typer()

    @app.command()
    @with_options
    def verb(measuring: Measuring, processes: Processes) -> None:
        found.append((measuring, processes))

    given = replace(Measuring(), seq_len=9, layers="spans", spans=(2, 3), dtype="bf16", seed=4)
    processes = Processes(tp=2, dp_shard=2)
    words = [*arguments(given), *arguments(processes)]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    assert found == [(given, processes)]
