"""Nanotron checkpoints written and read with torch and safetensors alone, for the tests to compare
with: nothing here uses Bevatron. Names, cuts and metadata are those that Nanotron 0.4 writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "intermediate_size": 48, "max_position_embeddings": 128}
SIZES |= {"rope_theta": 50000.0, "rms_norm_eps": 1e-5, "bos_token_id": 3, "eos_token_id": 5}


def llama(dtype=torch.float32, **changes):
    """A random Llama whose every part matters: norms, and weights of a size that is seen."""
    config = transformers.LlamaConfig(**{**SIZES, "pad_token_id": None, **changes})
    return randomised(transformers.LlamaForCausalLM(config), dtype)


def qwen2(dtype=torch.float32, **changes):
    """Like `llama`, with biases on q, k and v."""
    config = transformers.Qwen2Config(**{**SIZES, "pad_token_id": None, **changes})
    return randomised(transformers.Qwen2ForCausalLM(config), dtype)


def randomised(model, dtype):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        centre = 1.0 if "norm" in name else 0.0
        parameter.data = centre + noise * (0.2 if parameter.ndim == 1 else 0.15)
    return model.to(dtype).eval()


def interleave(heads, head_dim):
    """Rows of each head as rotated pairs: 0, d/2, 1, d/2 + 1, ..."""
    parts = []
    for head in heads.split(head_dim):
        half = head_dim // 2
        parts += [torch.stack((head[j], head[j + half])) for j in range(half)]
    return torch.cat(parts)


def whole(model, interleaved=False):
    """Nanotron's parameters before they are cut: name -> (parts, the dimension that is cut)."""
    weights, config = model.state_dict(), model.config
    found = {
        "token_position_embeddings.pp_block.token_embedding.weight": (
            [weights["model.embed_tokens.weight"]],
            0,
        ),
        "final_layer_norm.pp_block.weight": ([weights["model.norm.weight"]], None),
    }
    if not config.tie_word_embeddings:
        found["lm_head.pp_block.weight"] = ([weights["lm_head.weight"]], 0)
    head_dim = config.hidden_size // config.num_attention_heads
    for i in range(config.num_hidden_layers):
        hf, nt = f"model.layers.{i}.", f"decoder.{i}.pp_block."
        for kind in ("weight", "bias"):
            names = [f"{hf}self_attn.{x}_proj.{kind}" for x in "qkv"]
            if names[0] in weights:
                q, k, v = (weights[name] for name in names)
                if interleaved:
                    q, k = interleave(q, head_dim), interleave(k, head_dim)
                found[f"{nt}attn.qkv_proj.{kind}"] = ([q, k, v], 0)
        gate_up = [weights[f"{hf}mlp.{x}_proj.weight"] for x in ("gate", "up")]
        found[f"{nt}mlp.gate_up_proj.weight"] = (gate_up, 0)
        found[f"{nt}attn.o_proj.weight"] = ([weights[f"{hf}self_attn.o_proj.weight"]], 1)
        found[f"{nt}mlp.down_proj.weight"] = ([weights[f"{hf}mlp.down_proj.weight"]], 1)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{nt}{name}.weight"] = ([weights[f"{hf}{name}.weight"]], None)
    return {f"model.{name}": value for name, value in found.items()}


def spelled(cut, split, dims):
    return "|".join(cut if d == split else "None,None,None" for d in range(dims))


def shard(parts, split, rank, tp, numpy):
    """One rank's tensor and its metadata."""
    mine, pairs, local, at = [], [], 0, 0
    for part in parts:
        size, n = part.shape[split], part.shape[split] // tp
        mine.append(part.narrow(split, rank * n, n))
        here = f"{local},{local + n},None" if len(parts) > 1 else "None,None,None"
        there = f"{at + rank * n},{at + (rank + 1) * n},None"
        pairs.append(f"{spelled(here, split, part.ndim)}#{spelled(there, split, part.ndim)}")
        local, at = local + n, at + size
    shape = list(parts[0].shape)
    shape[split] = at
    text = [f"np.int64({n})" if numpy and d == split else str(n) for d, n in enumerate(shape)]
    metadata = {"version": "1.5", "local_global_slices_pairs": ";".join(pairs)}
    metadata["unsharded_shape"] = f"({', '.join(text)}{',' if len(text) == 1 else ''})"
    return torch.cat(mine, split).contiguous().clone(), metadata


def stage(name, layers, pp):
    """The pipeline rank that holds a parameter."""
    if "decoder" in name:
        return int(name.split(".")[2]) * pp // layers
    return 0 if "embed" in name else pp - 1


def write(root: Path, model, tp=1, pp=1, interleaved=False, numpy=False, step=7, **fields) -> Path:
    """Write `model` as Nanotron would at that layout; returns the root."""
    folder = root / str(step)
    for name, (parts, split) in whole(model, interleaved).items():
        *path, kind = name.split(".")
        place = folder.joinpath("model", *path)
        place.mkdir(parents=True, exist_ok=True)
        if split is None:
            data = {"data": parts[0].clone()}
            save_file(data, place / f"model_{kind}.safetensors", metadata={})
            continue
        at = stage(name, model.config.num_hidden_layers, pp)
        for rank in range(tp):
            data, metadata = shard(parts, split, rank, tp, numpy)
            file = f"model_{kind}_pp-rank-{at}-of-{pp}_tp-rank-{rank}-of-{tp}.safetensors"
            save_file({"data": data}, place / file, metadata=metadata)
    (folder / "model_config.json").write_text(json.dumps(model_config(model, interleaved) | fields))
    metas = {"last_train_step": step, "consumed_train_samples": 0}
    (folder / "checkpoint_metadata.json").write_text(json.dumps({"tp": tp, "metas": metas}))
    (folder / "config.yaml").write_text("general: {project: x}\n")
    for name in ("optimizer", "lr_scheduler", "random"):
        (folder / name).mkdir()
        (folder / name / "state_pp-0-of-1.pt").write_bytes(b"\x80\x04N.")
    (root / "latest.txt").write_text(str(step))
    return root


def model_config(model, interleaved=False) -> dict:
    c = model.config
    names = [*SIZES, "hidden_act", "initializer_range", "tie_word_embeddings", "pad_token_id"]
    config = {name: getattr(c, name) for name in names if name != "rope_theta"}
    biased = "model.layers.0.self_attn.q_proj.bias" in model.state_dict()
    config |= {"rope_theta": c.rope_parameters["rope_theta"], "attention_bias": biased}
    config |= {"is_qwen2_config": True, "rope_interleaved": interleaved, "rope_scaling": None}
    config |= {"pretraining_tp": 1, "use_cache": True, "moe_config": None, "z_loss_enabled": True}
    config |= {"_attn_implementation": "flash_attention_2", "_fused_rms_norm": True}
    config |= {"_fused_rotary_emb": True, "_use_qkv_packed": True, "_use_doc_masking": False}
    config |= {"log_attn_probs": True, "ring_attn_heads_k_stride": None, "_is_using_mup": False}
    config |= {"flex_attention_mask": None, "rope_seq_len_interpolation_factor": None}
    return config | {"sliding_window_size": None, "no_rope_layer": None, "z_loss_coefficient": 1e-4}


def slices(text):
    parts = [p.split(",") for p in text.split("|")]
    return tuple(slice(*(None if x == "None" else int(x) for x in p)) for p in parts)


def read(root: Path) -> dict:
    """Nanotron's own way to read: every shard to where its slice pairs say. Name -> tensor."""
    folder = root / (root / "latest.txt").read_text()
    found: dict = {}
    for path in sorted((folder / "model").rglob("*.safetensors")):
        kind = path.name.removeprefix("model_").removesuffix(".safetensors").split("_pp-rank")[0]
        name = ".".join((*path.parent.relative_to(folder / "model").parts, kind))
        with safe_open(path, "pt") as file:
            metadata, data = file.metadata() or {}, file.get_tensor("data")
        if not metadata:
            found[name] = data
            continue
        assert set(metadata) == {"version", "unsharded_shape", "local_global_slices_pairs"}
        shape = [int(n) for n in metadata["unsharded_shape"].strip("()").split(",") if n]
        tensor = found.setdefault(name, torch.zeros(shape, dtype=data.dtype))
        for pair in metadata["local_global_slices_pairs"].split(";"):
            local, there = map(slices, pair.split("#"))
            tensor[there] = data[local]
    return found
