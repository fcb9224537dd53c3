"""Hub ids: the real huggingface_hub against a small server that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.bridge.hf_folders import make

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One repository, org/model, whose branch main is at COMMIT."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path in ("/api/models/org/model", *_revisions("/api/models/org/model/revision")):
            names = [p.relative_to(self.server.folder).as_posix() for p in self._files()]
            siblings = [{"rfilename": name} for name in names]
            found = {"id": "org/model", "sha": COMMIT, "private": False, "siblings": siblings}
            self._send(200, json.dumps(found).encode(), body, "application/json")
            return
        if path in _revisions("/api/models/org/model/tree"):
            tree = [
                {
                    "type": "file",
                    "path": p.relative_to(self.server.folder).as_posix(),
                    "size": p.stat().st_size,
                    "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                }
                for p in self._files()
            ]
            self._send(200, json.dumps(tree).encode(), body, "application/json")
            return
        for prefix in _revisions("/org/model/resolve"):
            file = self.server.folder / path.removeprefix(prefix + "/")
            if path.startswith(prefix + "/") and file.is_file():
                if body:
                    self.server.fetched.append(file.name)
                self._send(200, file.read_bytes(), body, "application/octet-stream")
                return
        self._send(404, b"{}", body, "application/json", {"X-Error-Code": "RepoNotFound"})

    def _files(self) -> list[Path]:
        return sorted(p for p in self.server.folder.rglob("*") if p.is_file())

    def _send(
        self, status: int, data: bytes, body: bool, kind: str, extra: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _revisions(prefix: str) -> list[str]:
    return [f"{prefix}/{name}" for name in ("main", "v1", COMMIT)]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = make(tmp_path / "repository", dtype="bfloat16", shard="20KB")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody wants")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"another one")
    (folder / "empty").rmdir()
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def command(hub: Hub, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-m", "bevatron", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
        env=environment | {"HF_HUB_DISABLE_XET": "1"},
    )


def test_a_hub_id_is_resolved_to_a_commit_and_only_what_is_needed_is_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    done = command(hub, tmp_path / "home", "inspect", "org/model", "--json")
    assert done.returncode == 0, done.stderr
    assert hub.fetched == ["config.json"]
    done = command(
        hub, tmp_path / "home", "import", "org/model", tmp_path / "native", "--revision", "v1"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "native" / "provenance.json").read_text())
    assert (record["source"], record["revision"]) == ("org/model", COMMIT)
    assert "pytorch_model.bin" not in hub.fetched
    assert "consolidated.00.pth" not in hub.fetched
    assert "tokenizer.json" in hub.fetched
    before = len(hub.fetched)
    done = command(hub, tmp_path / "home", "export", tmp_path / "native", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(hub.fetched) == before  # an export needs nothing but the checkpoint
    for file in hub.folder.rglob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    done = command(
        hub, tmp_path / "home", "export", tmp_path / "native", tmp_path / "new", "--dtype", "fp32"
    )
    card = (tmp_path / "new" / "README.md").read_text()
    assert "base_model: org/model" in card
    assert f"`org/model` at revision `{COMMIT}`" in card


@pytest.mark.parametrize("name", ["org/none", "org/model"])
def test_what_the_hub_does_not_have_is_one_clear_error(hub: Hub, tmp_path: Path, name: str) -> None:
    revision = ["--revision", "nowhere"] if name == "org/model" else []
    done = command(hub, tmp_path / "home", "import", name, tmp_path / "native", *revision)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert name in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "native").exists()


def test_a_path_that_exists_is_never_looked_up(hub: Hub, tmp_path: Path) -> None:
    make(tmp_path / "org" / "model")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "bevatron", "import", "org/model", "native"],
        capture_output=True,
        check=False,
        timeout=1800,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0
    assert hub.fetched == []
