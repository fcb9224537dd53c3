"""transformers' own tests of models, which no wheel has: where they are, and loading them.

    python -m tests.hf_common.theirs      # the sdist of the installed release, into .transformers/
    TRANSFORMERS_TESTS=CHECKOUT/tests     # or the tests of a checkout of the release's tag

An sdist lacks what is in folders below `tests/`. What the others import from there, small stand-ins
of ours give them (`standins/`): the tests of generation and of exporters come from a checkout only.
Nothing of transformers' source is kept in this repository.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import transformers

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".transformers"
PACKAGE = "transformers_tests"
STANDINS = Path(__file__).with_name("standins")


class MissingError(Exception):
    """The tests are not here; the message says what to do."""


def find() -> Path:
    """The folder of the tests of the installed release. Raises MissingError."""
    if given := os.environ.get("TRANSFORMERS_TESTS"):
        folder, version = Path(given), _version_of(Path(given).parent)
        if not (folder / "test_modeling_common.py").is_file():
            raise MissingError(f"TRANSFORMERS_TESTS={given} has no test_modeling_common.py")
        if version not in (None, transformers.__version__):
            raise MissingError(f"{given} is of {version}, installed is {transformers.__version__}")
        return folder
    folder = FOLDER / f"transformers-{transformers.__version__}" / "tests"
    if not folder.is_dir():
        raise MissingError(
            f"transformers' own tests of {transformers.__version__} are not here: "
            "python -m tests.hf_common.theirs brings them"
        )
    return folder


def _version_of(checkout: Path) -> str | None:
    file = checkout / "src" / "transformers" / "__init__.py"
    found = re.search(r'__version__ = "(.+)"', file.read_text()) if file.is_file() else None
    return found[1] if found else None


def load(*names: str) -> list[Any]:
    """Modules of their tests, such as `test_modeling_common`. Raises MissingError."""
    folder = find()
    try:
        importlib.import_module("parameterized")
    except ImportError as error:
        raise MissingError("transformers' own tests need `pip install parameterized`") from error
    package = FOLDER / "packages" / PACKAGE  # a folder, so that processes that they start find it
    package.mkdir(parents=True, exist_ok=True)
    path = [str(folder.resolve()), str(STANDINS)]
    text = f"import tests\n\n__path__ = {path}\ntests.__path__ += {path[:1]}  # as some import\n"
    (package / "__init__.py").write_text(text, encoding="utf-8")
    sys.path.insert(0, str(package.parent))
    sys.path.append(str(folder.resolve().parent))  # where a checkout has its `utils`
    return [importlib.import_module(f"{PACKAGE}.{name}") for name in names]


def bring() -> Path:
    """Download the sdist of the installed release and unpack its tests."""
    release = f"transformers=={transformers.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        subprocess.run([*line, "--no-binary", "transformers", release], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tests = [m for m in tar.getmembers() if "/tests/" in m.name]
            tar.extractall(FOLDER, tests, filter="data")
    folder = find()
    (folder / "__init__.py").touch()  # one of them imports its own folder
    return folder


if __name__ == "__main__":
    print(bring())
