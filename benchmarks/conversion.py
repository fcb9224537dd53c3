"""Conversion beside `cp` and beside transformers, on a random checkpoint.

    python benchmarks/conversion.py --dir DIR [--model llama3.2-1b] [--rounds 3] [--brief]

Every measurement is a fresh process; the contenders take turns, so that a slow minute of the
machine hits all of them. As users run it, Bevatron hashes everything, reads back what it wrote,
looks for NaN, and syncs to the disk, which neither `cp` nor transformers does. So `cp, synced`
stands beside it, and two runs of Bevatron with a part of that switched off, which only this
benchmark can do. Memory is the peak RSS of the process. The page cache is warm. Needs 4 times the
checkpoint on the disk, which is freed afterwards.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
from measured import measured

from bevatron.bridge.export_plan import SHARD_SIZE, new_shards
from bevatron.families import for_spec
from bevatron.families.published_models import preset

CONVERT = "from bevatron.bridge.convert import {name} as f; f({a!r}, {b!r})"
NO_SYNC = "import os; os.fsync = lambda fd: None; "
NO_HASH = """
import xxhash
class Nothing:
    def update(self, data): pass
    def hexdigest(self): return "0" * 32
xxhash.xxh3_128 = Nothing
from bevatron.bridge import cast
from bevatron.bridge import export_hf
from bevatron.bridge import import_hf
dtypes.NonFinite.update = lambda self, data: None
class Same(str):
    def __ne__(self, other): return False
exporter.spell = lambda hasher: Same()
importer._read_back = exporter._read_back = lambda *arguments: {"tensors": 0}
"""
TRANSFORMERS = (
    "from transformers import AutoModelForCausalLM as A; import torch; "
    "A.from_pretrained({a!r}, dtype=torch.bfloat16).save_pretrained({b!r})"
)


def make(folder: Path, model: str) -> int:
    """Write the checkpoint in shards of up to 5 GB, a tensor at a time; its bytes."""
    spec = preset(model)
    family = for_spec(spec)
    sources = [s for e in family.weight_map(spec) for s in e.sources]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(family.config(spec, "bfloat16"), indent=2))
    places, headers, index = new_shards({s.name: ("BF16", s.shape) for s in sources}, SHARD_SIZE)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    random = np.random.default_rng(0)
    for file, header in headers.items():
        with (folder / file).open("wb") as out:
            out.write(header)
            inside = [(t.begin, t.nbytes) for f, t in places.values() if f == file]
            for _, nbytes in sorted(inside):
                # random bits, with an exponent that makes every number finite and small
                bits = random.integers(0, 1 << 64, -(-nbytes // 8), dtype="u8")
                out.write((bits & np.uint64(0xBFFFBFFFBFFFBFFF)).tobytes()[:nbytes])
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def prime(work: Path) -> None:
    """Give every contender the same start: dirty pages written, and as much memory as it will fill
    just freed. (On a virtual machine pages never used before cost several times as much.)"""
    shutil.copytree(work / "hf", work / "scratch")
    shutil.rmtree(work / "scratch")
    os.sync()


def contenders(work: Path, transformers: bool) -> dict[str, tuple[list[str], Path]]:
    """Name -> command and what it writes, in the order of a round."""
    hf, native, out = work / "hf", work / "native", work / "out"
    python = [sys.executable, "-c"]
    copy = ["cp", "-r", "--reflink=never", str(hf), str(work / "cp")]
    synced = f"cp -r --reflink=never {hf} {work}/cps && sync -f {work}/cps/*.safetensors"
    found = {
        "cp -r": (copy, work / "cp"),
        "cp -r, synced": (["sh", "-c", synced], work / "cps"),
    }
    for verb, a, b in (("import", hf, native), ("export", native, out)):
        convert = CONVERT.format(name=f"{verb}_checkpoint", a=str(a), b=str(b))
        found |= {
            f"bevatron {verb}, no hash, no fsync": ([*python, NO_SYNC + NO_HASH + convert], b),
            f"bevatron {verb}, no fsync": ([*python, NO_SYNC + convert], b),
            f"bevatron {verb}": ([*python, convert], b),
        }
    if transformers:
        saved = work / "saved"
        command = [*python, TRANSFORMERS.format(a=str(hf), b=str(saved))]
        found["transformers load + save"] = (command, saved)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--model", default="llama3.2-1b", help="a preset")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--brief", action="store_true", help="nothing switched off")
    options = parser.parse_args()
    work = options.dir / "bevatron-conversion"
    if work.exists():
        sys.exit(f"{work}: already exists; remove it or name another --dir")
    try:
        nbytes = make(work / "hf", options.model)
        todo = contenders(work, not options.no_transformers)
        if options.brief:
            todo = {name: found for name, found in todo.items() if ", no" not in name}
        results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in todo}
        for number in range(options.rounds):
            for name, (command, target) in todo.items():
                shutil.rmtree(target, ignore_errors=True)
                prime(work)
                cost = measured(command)
                results[name].append((cost.wall_s, cost.cpu_s, cost.peak_mb))
                print(f"round {number + 1}: {name}: {results[name][-1][0]:.2f} s", file=sys.stderr)
                if name == "bevatron export":
                    same = all(
                        filecmp.cmp(p, target / p.name, shallow=False)
                        for p in (work / "hf").iterdir()
                    )
                    print(f"  identical to the source: {same}", file=sys.stderr)
                if target.name not in ("native", "out"):
                    shutil.rmtree(target)
                elif target.name == "out" and name == "bevatron export":
                    shutil.rmtree(work / "native")
                    shutil.rmtree(target)
        report(results, options.model, nbytes)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def report(results: dict[str, list[tuple[float, float, float]]], model: str, nbytes: int) -> None:
    """The table, in Markdown."""
    base = statistics.median(r[0] for r in results["cp -r"])
    print(f"{model}, {nbytes / 1e9:.2f} GB, bf16, {os.cpu_count()} cores; medians of rounds\n")
    print("| | wall s (all rounds) | CPU s | peak MB | wall / cp |")
    print("|---|---|---|---|---|")
    for name, rounds in results.items():
        wall, cpu, memory = (statistics.median(r[i] for r in rounds) for i in range(3))
        every = ", ".join(f"{r[0]:.2f}" for r in rounds)
        print(f"| {name} | {wall:.2f} ({every}) | {cpu:.2f} | {memory:.0f} | {wall / base:.2f} |")
    print(f"\nRepeat with `python benchmarks/conversion.py --dir DIR --model {model}`.")


if __name__ == "__main__":
    main()
