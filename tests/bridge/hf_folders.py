"""Small Hugging Face folders for the tests of this room, made by transformers or by hand."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

SIZES = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes}))


def nemotron(**changes):
    config = transformers.NemotronConfig(**{**SIZES, "head_dim": 8, **changes})
    return transformers.NemotronForCausalLM(config)


def nanochat(**changes):
    return transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**{**SIZES, **changes}))


def mistral(**changes):
    config = transformers.MistralConfig(**{**SIZES, "sliding_window": None, **changes})
    return transformers.MistralForCausalLM(config)


MAKERS = {"llama": llama, "nemotron": nemotron, "nanochat": nanochat, "mistral": mistral}


def make(path: Path, maker: str = "llama", dtype: str = "float32", shard: str = "5GB", **changes):
    """Save a tiny random model of real transformers code, with other files around it."""
    torch.manual_seed(0)
    model = MAKERS[maker](**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shard)
    add_others(path)
    return path


def add_others(path: Path) -> None:
    """Files as published models have them: tokenizer, template, remote code, folders."""
    (path / "tokenizer.json").write_text('{"a": 1,\r\n "b":2}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / ".gitattributes").write_bytes(b"*.safetensors lfs\n")
    (path / "modeling_x.py").write_text("raise SystemExit('never run')\n")
    (path / "provenance.json").write_text("not ours")
    (path / "manifest.json").write_text("[1]")
    (path / "docs" / "deep").mkdir(parents=True)
    (path / "docs" / "deep" / "params.json").write_bytes(bytes(range(256)))
    (path / "empty").mkdir()
    (path / "empty.txt").touch()


def rewrite(path: Path, change) -> None:
    """Change the tensors of a single-file folder."""
    from safetensors.torch import load_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps(config))


def assert_same_folder(a: Path, b: Path) -> None:
    """`diff -r` finds nothing."""
    names = sorted(p.relative_to(a).as_posix() for p in a.rglob("*"))
    assert names == sorted(p.relative_to(b).as_posix() for p in b.rglob("*"))
    for name in names:
        assert (a / name).is_dir() == (b / name).is_dir()
        if (a / name).is_file():
            assert filecmp.cmp(a / name, b / name, shallow=False), name
