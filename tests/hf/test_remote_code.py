"""The code that an exported Llama-Nemotron carries: the newest of ours, and theirs untouched."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bevatron.bridge.conversion_preview import preview_export
from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.remote_code import AUTO_MAP, marked, own_code, own_version
from tests.hf.test_hf import BLOCKS, save

OURS = marked(b"# of an earlier release\n", 0)
THEIRS = {
    "another's": b"# theirs\n",
    "ours, edited": OURS.replace(b"earlier", b"changed"),
    "of a later release": marked(b"# to come\n", 10_000),
}


def native(tmp_path: Path, code: bytes) -> Path:
    """The import of a folder that carries `code`."""
    save(tmp_path / "hf", BLOCKS, auto_map=AUTO_MAP)
    (tmp_path / "hf" / "modeling_decilm.py").write_bytes(code)
    import_checkpoint(tmp_path / "hf", tmp_path / "native")
    return tmp_path / "native"


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("code", [OURS, OURS.replace(b"\n", b"\r\n")], ids=["as-is", "crlf"])
def test_an_earlier_release_of_our_code_is_replaced(
    code: bytes, dtype: str | None, tmp_path: Path
) -> None:
    source = native(tmp_path, code)
    planned = preview_export(source, tmp_path / "out", dtype=dtype)
    report = export_checkpoint(source, tmp_path / "out", dtype=dtype)
    assert (tmp_path / "out" / "modeling_decilm.py").read_bytes() == own_code()
    said = [note for note in report.notes if "modeling_decilm.py" in note]
    assert len(said) == 1
    assert "replaced" in said[0]
    assert planned.skipped.keys() == {"modeling_decilm.py"}
    assert (planned.files, report.identical) == (1, False)
    if dtype is None:  # nothing else is touched
        before, after = files(tmp_path / "hf"), files(tmp_path / "out")
        assert {n for n in before | after if before.get(n) != after.get(n)} == {
            "modeling_decilm.py"
        }


@pytest.mark.parametrize("case", [*THEIRS, "the present one"])
def test_other_code_is_kept_byte_for_byte(case: str, tmp_path: Path) -> None:
    code = THEIRS.get(case) or own_code()
    report = export_checkpoint(native(tmp_path, code), tmp_path / "same")
    assert report.identical
    assert not [note for note in report.notes if "modeling_decilm" in note]
    assert files(tmp_path / "same") == files(tmp_path / "hf")
    export_checkpoint(tmp_path / "native", tmp_path / "out", dtype="bf16")
    assert (tmp_path / "out" / "modeling_decilm.py").read_bytes() == code
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == AUTO_MAP


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_our_code_says_which_version_it_is() -> None:
    code = own_code()
    found = own_version(code)
    wanted = marked(code, found or 1).splitlines()[-1].decode()
    assert found, f"hf.py was changed: count up the number in its last line, which is then {wanted}"


def test_every_version_that_there_was_is_recognised() -> None:
    def git(*words: str) -> bytes:
        line = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(line, capture_output=True, check=True).stdout

    try:
        commits = git("log", "--format=%h", "--", ":/src/bevatron/hf.py").decode().split()
    except (OSError, subprocess.CalledProcessError):
        commits = []
    if not commits:
        pytest.skip("no history of git here")
    unknown = [c for c in commits if own_version(git("show", f"{c}:src/bevatron/hf.py")) is None]
    assert unknown == []
