"""Pruned models for the tests: sources with scores, and the slices that they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from bevatron.bridge.convert import import_checkpoint
from bevatron.bridge.open_native import open_native
from bevatron.compress.importance_scores import Scores, expected, spec_hash
from bevatron.compress.prune_targets import Targets
from bevatron.parallel.whole_decoder import load_decoder
from bevatron.spec import ModelSpec
from tests.bridge.hf_folders import make

IDS = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(1))


def random_scores(spec: ModelSpec, seed: int = 0, **more: np.ndarray) -> Scores:
    rng = np.random.default_rng(seed)
    tensors = {n: rng.random(s, dtype=np.float32) for n, s in expected(spec).items()}
    return Scores({**tensors, **more}, {"spec": spec_hash(spec)})


def source(tmp_path: Path, maker: str = "llama", **changes) -> tuple[Path, ModelSpec, Scores]:
    """A native checkpoint, and scores for it."""
    make(tmp_path / "hf", maker, **changes)
    import_checkpoint(tmp_path / "hf", tmp_path / "native", show_progress=False)
    spec = open_native(tmp_path / "native").spec
    return tmp_path / "native", spec, random_scores(spec)


def stock(folder: Path) -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), dict(model.state_dict())


def native_logits(folder: Path) -> torch.Tensor:
    decoder, _ = load_decoder(folder, dtype=torch.float32)
    with torch.no_grad():
        return decoder.logits(IDS)


def sliced(
    old: dict[str, torch.Tensor], spec: ModelSpec, scores: Scores, targets: Targets
) -> dict[str, torch.Tensor]:
    """The pruned state dict, from the names of transformers alone."""
    t = {k: torch.from_numpy(np.array(v)) for k, v in scores.tensors.items()}

    def best(values: torch.Tensor, count: int) -> torch.Tensor:
        return values.topk(count).indices.sort().values

    h = best(t["embedding.channels"], targets.hidden_size or spec.hidden_size)
    layers = [i for i in range(len(spec.layers)) if i not in targets.drop_layers]
    new = {}
    for name, whole in old.items():
        value = whole
        parts = name.split(".")
        if "layers" not in parts:
            new[name] = value[..., h] if parts[-2] != "classifier" else value
            continue
        i = int(parts[2])
        if i not in layers:
            continue
        a, m = spec.layers[i].attention, spec.layers[i].mlp
        q, groups = a.num_attention_heads, a.num_key_value_heads
        wanted = targets.num_attention_heads or q
        per_group = t[f"layers.{i}.attention.heads"].reshape(groups, -1)
        heads = torch.cat(
            [best(per_group[g], wanted // groups) + g * (q // groups) for g in range(groups)]
        )
        rows = torch.cat([torch.arange(x * a.head_dim, (x + 1) * a.head_dim) for x in heads])
        f = best(t[f"layers.{i}.mlp.neurons"], targets.intermediate_size or m.intermediate_size)
        kind, weight = parts[-2], parts[-1] == "weight"
        if kind == "q_proj":
            value = value[rows]
        if kind in ("gate_proj", "up_proj", "fc1"):
            value = value[f]
        if kind in ("o_proj", "down_proj", "fc2"):
            if weight:
                value = value[:, rows if kind == "o_proj" else f]
            value = value[h]
        elif "norm" in kind or weight:
            value = value[..., h]
        parts[2] = str(layers.index(i))
        new[".".join(parts)] = value
    return new


BOTH = Targets(hidden_size=16, intermediate_size=24, drop_layers=(1,))
