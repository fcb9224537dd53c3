"""Time and peak memory of pruning an 8B-shaped checkpoint to the Llama-3.1-Minitron-4B sizes.

    python benchmarks/pruning.py FOLDER

Needs 26 GB of disk in FOLDER (16 for the source, 9 for one result at a time) and removes what it
made. The source is an ordinary Hugging Face folder whose weights are one random block repeated.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from measured import measured

from bevatron.bridge.export_plan import new_shards
from bevatron.compress.importance_scores import Scores, expected, spec_hash
from bevatron.families import by_name
from bevatron.families.published_models import preset

BLOCK = 32 << 20
CASES = {
    "width": (["--hidden-size", "3072", "--intermediate-size", "9216"], 4_512_746_496),
    "depth": (["--drop-layers", "15-30"], 4_540_469_248),
}


def make(folder: Path) -> None:
    """Write the source and its scores."""
    spec, family = preset("llama3.1-8b"), by_name("llama")
    tensors = {s.name: ("BF16", s.shape) for e in family.weight_map(spec) for s in e.sources}
    places, headers, index = new_shards(tensors, 5 << 30)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(BLOCK // 2).astype("<f4") * 0.02).view("<u4") >> 16
    block = noise.astype("<u2").tobytes()
    for file, header in headers.items():
        size = max(t.end for name, t in places.values() if name == file)
        with (folder / file).open("wb") as out:
            out.write(header)
            while out.tell() < size:
                out.write(block[: size - out.tell()])
    config = family.config(spec, "bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    scores = {n: rng.random(s, dtype=np.float32) for n, s in expected(spec).items()}
    Scores(scores, {"spec": spec_hash(spec)}).write(folder.parent / "scores.safetensors")


def main() -> None:
    root = Path(sys.argv[1]) / "pruning-benchmark"
    source, target = root / "source", root / "pruned"
    try:
        make(source)
        for name, (options, count) in CASES.items():
            command = [sys.executable, "-m", "bevatron", "prune", str(source), str(target)]
            command += ["--scores", str(root / "scores.safetensors"), "--json", *options]
            cost = measured(command)
            report = json.loads(cost.stdout)
            assert report["parameters"] == count, report["parameters"]
            print(f"{name}: {count:,} parameters, {cost.wall_s:.1f} s, ", end="")
            print(f"{cost.cpu_s:.1f} CPU-s, peak {cost.peak_mb:.0f} MB")
            shutil.rmtree(target)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
