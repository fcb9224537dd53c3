"""Killed at any moment, tokenizing goes on from there; the bytes do not show how it was done."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bevatron.data import tokenize as tokenize_module
from bevatron.data.text_encoder import choose
from bevatron.data.token_store import DOCUMENTS, FILE_NAME, TOKENS
from bevatron.data.tokenize import tokenize
from bevatron.data.tokenize_part import DONE, Job, find_done, make_part
from bevatron.data.tokenize_sources import plan
from bevatron.data.tokenizer import open_tokenizer
from bevatron.errors import BevatronError
from tests.data.test_tokenize import model  # noqa: F401  (a fixture)

PART = 4000
SCRIPT = """
import os, signal, sys, time
from bevatron.data import tokenize as module
from bevatron.data.tokenize import tokenize
from pathlib import Path
module.HERE = 0
folder, model, workers, parts, pause = sys.argv[1:]
real = module.in_workers
def some(*arguments):  # are done now; those before were done by a run before
    already = len(list((Path(folder) / ".out.parts").glob("*/{done}")))
    for n, number in enumerate(real(*arguments), 1):
        if already + n >= int(parts):
            time.sleep(float(pause))
            os.kill(os.getpid(), signal.SIGKILL)
        yield number
module.in_workers = some
tokenize([Path(folder) / "in"], Path(folder) / "out", tokenizer=model, workers=int(workers),
         part_bytes={part})
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Some 250 KB: a long text, a long .jsonl and many short files."""
    folder = tmp_path / "in"
    folder.mkdir()
    text = Path(json.__file__).read_text(encoding="utf-8")
    (folder / "long.txt").write_text(text * 6)
    lines = [json.dumps({"text": f"{i} {line}"}) for i, line in enumerate(text.splitlines() * 4)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    for i in range(20):
        (folder / f"{i}.txt").write_text(text[i * 100 : i * 200])
    return folder


def content(store: Path) -> list[bytes]:
    return [(store / name).read_bytes() for name in (TOKENS, DOCUMENTS, FILE_NAME)]


def test_the_bytes_do_not_depend_on_the_workers(
    corpus: Path,
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenize_module, "HERE", 0)
    stores = []
    for workers in (1, 3):
        store = corpus.parent / str(workers)
        tokenize([corpus], store, tokenizer=model, workers=workers, part_bytes=PART)
        stores.append(content(store))
    assert stores[0] == stores[1]
    assert sorted(p.name for p in corpus.parent.iterdir()) == ["1", "3", "in"]


def test_engines_write_the_same_tokens(
    corpus: Path,
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tiktoken")
    monkeypatch.setattr(tokenize_module, "HERE", 0)
    a = tokenize([corpus], corpus.parent / "a", tokenizer=model, engine="tokenizers")
    b = tokenize(
        [corpus],
        corpus.parent / "b",
        tokenizer=model,
        engine="tiktoken",
        part_bytes=PART,
        workers=2,
    )
    assert (a.info.hash, a.info.documents_hash) == (b.info.hash, b.info.documents_hash)
    assert a.info.engine == {"name": "tokenizers", "why": "asked for"}
    assert b.info.engine is not None
    assert b.info.engine["name"] == "tiktoken"


def killed(folder: Path, model: Path, parts: int, pause: float) -> bool:  # noqa: F811
    """Run it with two workers, and let it be killed some time after it has finished so many parts,
    unless there are fewer; whether it was. Its workers must end by themselves."""
    script = SCRIPT.format(part=PART, done=DONE)
    command = [sys.executable, "-c", script, str(folder), str(model), "2", str(parts), str(pause)]
    status = subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    corpus: Path,
    model: Path,  # noqa: F811
    kills: int,
) -> None:
    count = len(plan([corpus], Counter(), part_bytes=PART))
    assert count > 32
    whole = corpus.parent / "whole"
    tokenize([corpus], whole, tokenizer=model, workers=1, part_bytes=PART)
    out, parts = corpus.parent / "out", corpus.parent / ".out.parts"
    rng = random.Random(0)
    halves, before = 0, 0
    for target in sorted(rng.sample(range(1, count), kills)):
        if killed(corpus.parent, model, target, rng.uniform(0, 0.02)):
            assert not out.exists()
            done = len(list(parts.glob(f"*/{DONE}")))
            assert done > before, "a part that was done is gone, or nothing went on"
            halves, before = halves + 1, done
        else:  # the kill before came when all parts were done
            shutil.rmtree(out)
            before = 0
    assert halves >= kills // 2
    assert not killed(corpus.parent, model, count + 1, 0)
    assert content(out) == content(whole)
    assert sorted(p.name for p in corpus.parent.iterdir()) == ["in", "out", "whole"]


def prepared(corpus: Path, model: Path) -> tuple[list[Path], Job, Path]:  # noqa: F811
    """All parts but the last, done as a killed run leaves them."""
    opened = open_tokenizer(model)
    choice = choose("auto", opened.file, opened.encoder, [], 0)
    job = Job(opened.fingerprint, choice.engine, opened.vocab_size, opened.eos_id, "text")
    beside = corpus.parent / ".out.parts"
    beside.mkdir()
    folders = []
    for part in plan([corpus], Counter(), part_bytes=PART)[:-1]:
        folders.append(beside / job.key(part))
        make_part(folders[-1], part, job, choice.encoder(opened.encoder))
    return folders, job, beside


def test_finished_parts_are_not_done_again(
    corpus: Path,
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders, _, beside = prepared(corpus, model)
    (beside / ".half.123").mkdir()
    made: list[Path] = []

    def count(folder: Path, *arguments: object) -> None:
        made.append(folder)
        make_part(folder, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenize_module, "make_part", count)
    tokenize([corpus], corpus.parent / "out", tokenizer=model, part_bytes=PART)
    assert len(made) == 1
    assert made[0] not in folders
    assert not beside.exists()


@pytest.mark.parametrize("what", ["source", "options", "damage"])
def test_parts_of_another_plan_and_damaged_ones_are_done_anew(
    corpus: Path,
    model: Path,  # noqa: F811
    what: str,
) -> None:
    folders, _, _ = prepared(corpus, model)
    eos = True
    if what == "source":
        (corpus / "19.txt").write_text("another text")
    elif what == "options":
        eos = False
    else:  # as after a loss of power: the right size, other bytes, and a file that is missing
        found = [f for f in folders if (f / TOKENS).stat().st_size][:2]
        tokens = found[0] / TOKENS
        tokens.write_bytes(b"\0" * tokens.stat().st_size)
        (found[1] / DOCUMENTS).unlink()
        (folders[-1] / DONE).write_text("{")
        assert find_done(folders[-1]) is None
    options = {"tokenizer": model, "append_eos": eos, "part_bytes": PART}
    a = tokenize([corpus], corpus.parent / "out", **options)  # type: ignore[arg-type]
    b = tokenize([corpus], corpus.parent / "other", **options)  # type: ignore[arg-type]
    assert content(a.path) == content(b.path)


def test_after_a_mistake_the_finished_parts_stay(corpus: Path, model: Path) -> None:  # noqa: F811
    lines = (corpus / "lines.jsonl").read_text()
    (corpus / "lines.jsonl").write_text(lines + "\noops")
    with pytest.raises(BevatronError, match=r"not valid JSON .* the same command goes on"):
        tokenize([corpus], corpus.parent / "out", tokenizer=model, part_bytes=PART)
    parts = corpus.parent / ".out.parts"
    assert list(parts.glob(f"*/{DONE}"))
    assert not list(parts.glob(".*"))
    (corpus / "lines.jsonl").write_text(lines)
    tokenize([corpus], corpus.parent / "out", tokenizer=model, part_bytes=PART)
    assert not parts.exists()


def test_a_worker_that_dies_or_fails_is_reported(
    corpus: Path,
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenize_module, "HERE", 0)
    (corpus / "bad.jsonl").write_text("oops")
    with pytest.raises(BevatronError, match=r"bad\.jsonl: line 1 is not valid JSON"):
        tokenize([corpus], corpus.parent / "out", tokenizer=model, workers=2, part_bytes=PART)
    (corpus / "bad.jsonl").unlink()
    from bevatron.data import tokenize_workers

    give = tokenize_workers._Worker.give

    def give_and_kill(self: tokenize_workers._Worker, task: object) -> None:
        give(self, task)  # type: ignore[arg-type]
        os.kill(self._process.pid, signal.SIGKILL)

    monkeypatch.setattr(tokenize_workers._Worker, "give", give_and_kill)
    with pytest.raises(BevatronError, match=r"ended with SIGKILL; .* use fewer --workers"):
        tokenize([corpus], corpus.parent / "out", tokenizer=model, workers=2, part_bytes=PART)
