"""`bevatron tokenize` beside the plain loop, on the source and documentation of Python's library.

    python benchmarks/tokenizing.py [--rounds 5] [--megabytes 64] [--vocab 32000] [--workers N]

The plain loop is what one writes first: one process, `tokenizer.encode` per document, the ids into
one file. Bevatron runs as users run it, start of the processes, proof of the fast path, hashes,
sync and the joining of parts included, once with the engine that it chooses and once with
`tokenizers` alone. Every measurement is a fresh process; the contenders take turns, so that a slow
minute of the machine hits all of them. CPU seconds are of all processes together. Quote the ratios,
not the absolutes. The ids of all contenders are compared.

The text (installed packages' sources and docs follow where Python's own are not enough) and a
byte-level BPE trained on it are kept in a temporary folder for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measured import measured

from bevatron.data.token_store import TOKENS, TokenStore
from bevatron.data.tokenize import cores

EOS = "<|end|>"
PLAIN = """
import sys
from pathlib import Path
import numpy as np
from tokenizers import Tokenizer
text, model, out = map(Path, sys.argv[1:])
tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
eos = tokenizer.token_to_id("{eos}")
with out.open("wb") as file:
    for path in sorted(p for p in text.rglob("*") if p.is_file()):
        document = path.read_bytes().decode("utf-8-sig")
        ids = tokenizer.encode(document, add_special_tokens=False).ids
        file.write(np.array([*ids, eos], dtype="<u{size}").tobytes())
"""


def texts() -> Iterator[Path]:
    """Python's own first."""
    folders = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    for number, folder in enumerate(folders):
        for path in sorted(folder.rglob("*")):
            inside = "site-packages" in path.relative_to(folder).parts
            if path.suffix in (".py", ".txt", ".rst", ".md") and not (number == 0 and inside):
                yield path


def copy_text(target: Path, limit: int) -> int:
    """Copy text of up to `limit` bytes; how many there are."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copied = count = 0
    for path in texts():
        try:
            data = path.read_bytes()
            data.decode()
        except (OSError, UnicodeDecodeError):
            continue
        if not data or b"\0" in data or copied + len(data) > limit:
            continue
        folder = partial / f"{count // 500:03d}"
        folder.mkdir(exist_ok=True)
        (folder / f"{count:06d}.txt").write_bytes(data)
        copied, count = copied + len(data), count + 1
    partial.rename(target)
    return copied


def train(text: Path, target: Path, vocab: int) -> None:
    """A GPT-2-like byte-level BPE on (the first 24 MB of) the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|begin|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chosen, size = [], 0
    for path in sorted(text.rglob("*.txt")):
        size += path.stat().st_size
        if size <= 24_000_000:
            chosen.append(str(path))
    tokenizer.train(chosen, trainer)
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    tokenizer.save(str(target / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "bevatron-bench")
    arguments = parser.parse_args()
    home = arguments.dir
    text = home / f"text-{arguments.megabytes}"
    model = home / f"model-{arguments.megabytes}-{arguments.vocab}"
    if not text.exists():
        copy_text(text, arguments.megabytes * 1_000_000)
    if not model.exists():
        train(text, model, arguments.vocab)
    files = list(text.rglob("*.txt"))
    megabytes = sum(p.stat().st_size for p in files) / 1e6

    def bevatron(out: Path, *options: str) -> list[str]:
        call = [sys.executable, "-m", "bevatron", "tokenize", str(text), str(out)]
        call += ["--tokenizer", str(model), "--overwrite"]
        return [*call, "--workers", str(arguments.workers), *options]

    size = 2 if arguments.vocab <= 1 << 16 else 4
    plain = home / "plain.bin"
    script = PLAIN.format(eos=EOS, size=size)
    contenders = {
        "plain loop": [sys.executable, "-c", script, str(text), str(model), str(plain)],
        "bevatron": bevatron(home / "auto"),
        "bevatron, tokenizers": bevatron(home / "slow", "--engine", "tokenizers"),
    }
    for command in contenders.values():  # the page cache, once
        measured(command)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, command in contenders.items():
            cost = measured(command)
            taken[name].append((cost.wall_s, cost.cpu_s))

    print(f"{megabytes:.1f} MB in {len(files)} documents, vocabulary {arguments.vocab}, ", end="")
    print(
        f"{arguments.workers} workers on {cores()} cores (load {os.getloadavg()[0]:.1f}), ", end=""
    )
    print(f"{arguments.rounds} rounds, medians")
    print(f"{'':22} wall s   MB/s  ratio   CPU s  MB/CPU-s  ratio")
    base = taken["plain loop"]
    for name, pairs in taken.items():
        wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = [
            statistics.median(b[i] / own[i] for b, own in zip(base, pairs, strict=True))
            for i in (0, 1)
        ]
        print(
            f"{name:22} {wall:6.2f} {megabytes / wall:6.1f} {ratios[0]:5.2f}x {cpu:7.2f} "
            f"{megabytes / cpu:9.1f} {ratios[1]:5.2f}x"
        )
    ids = np.fromfile(plain, dtype=f"<u{size}")
    for name in ("auto", "slow"):
        store = TokenStore.open(home / name)
        found = np.fromfile(home / name / TOKENS, dtype=f"<u{size}")
        same = "identical to" if np.array_equal(found, ids) else "DIFFERENT from"
        print(f"{name}: engine {store.info.engine}; {len(found):,} ids, {same} the plain loop's")


if __name__ == "__main__":
    main()
