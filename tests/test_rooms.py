"""The order of the rooms, as docs/architecture.md lists it, and no circles among files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "bevatron"
BELOW_ALL = {"bevatron.errors", "bevatron.progress", "bevatron.option", "bevatron.hf"}
ABOVE_ALL = {"bevatron", "bevatron.__main__"}


def module_of(path: Path) -> str:
    """The dotted name of a file of the package; of its `__init__.py`, the folder's."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def rooms() -> list[str]:
    """The rooms, the highest one first, as the picture in docs/architecture.md has them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = text.partition("## The rooms")[2].partition("```")[2].partition("```")[0]
    return re.findall(r"^(\w+)/ ", picture, flags=re.MULTILINE)


def imported(tree: ast.AST, for_types: bool = True) -> Iterator[str]:
    """What a file imports of the package, wherever in it: at the top, in functions, and, if
    `for_types`, under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if for_types or not typing:
            yield from imported(node, for_types)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else str(node.module) for name in whole]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == "bevatron")


@cache
def imports(for_types: bool = True) -> dict[str, set[str]]:
    """Every file of the package and the files of it that it imports. The package itself is left
    out, as it is loaded before any of them (they take `__version__` from it)."""
    found = {}
    for module, path in FILES.items():
        names = set(imported(ast.parse(path.read_text(encoding="utf-8")), for_types))
        found[module] = names - {"bevatron", module}
    return found


def rank(module: str) -> int:
    """Where a file stands; a higher number is a higher room."""
    if module in BELOW_ALL:
        return -1
    if module in ABOVE_ALL:
        return len(rooms())
    return rooms()[::-1].index(module.split(".")[1])


def test_every_room_stands_in_the_picture_once() -> None:
    found = sorted({m.split(".")[1] for m in set(FILES) - ABOVE_ALL - BELOW_ALL})
    assert sorted(rooms()) == found


def test_no_file_imports_from_a_room_above_it_lazily_neither() -> None:
    upward = [
        f"{module} imports {name}"
        for module, names in imports().items()
        for name in sorted(names)
        if rank(name) > rank(module)
    ]
    assert not upward


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(imports(for_types=False)).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_an_import_in_a_function_counts() -> None:
    tree = ast.parse(
        "def f():\n    from bevatron.cli import main\n    import bevatron.data.tokenize"
    )
    assert set(imported(tree)) == {"bevatron.cli.main", "bevatron.data.tokenize"}
