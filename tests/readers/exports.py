"""Exports of every family, of pruned models and of models whose layers differ, with the greedy
tokens that Bevatron says for each and what the readers' table predicts. Small, random, fp32."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.open_native import open_native
from bevatron.bridge.remote_code import readers, write_remote_code
from bevatron.compress.prune import prune
from bevatron.compress.prune_targets import LayerTarget, Targets
from bevatron.parallel.whole_decoder import load_decoder
from tests.bridge.hf_folders import MAKERS
from tests.compress.pruned import random_scores
from tests.hf.test_hf import save as save_llama_nemotron
from tests.nn.llama_nemotron_reference import block

VOCAB, COUNT = 320, 12
PROMPT = [300, 17, 65, 112, 9, 210, 44]
# Heads of 32 dimensions, the smallest that vLLM's attention on a CPU knows.
SIZES = {"vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 512}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SIZES |= {"num_hidden_layers": 3, "bos_token_id": 0, "eos_token_id": 1}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
OLD_LLAMA3 = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
BIASED = {"attention_bias": True, "mlp_bias": True}
WHOLE, TWICE = block(2, 3.0), block(2, 6.0)  # MLP widths 256 and 512


@dataclass(frozen=True)
class Case:
    """How an export is made: `maker` with `changes`, or `blocks`; then pruned to `targets`."""

    maker: str
    changes: dict[str, Any]
    targets: Targets | None = None
    blocks: tuple[dict[str, Any], ...] = ()


def _made(maker: str, targets: Targets | None = None, **changes: Any) -> Case:
    return Case(maker, changes, targets)


def _blocks(*blocks: dict[str, Any], **changes: Any) -> Case:
    return Case("llama_nemotron", changes, None, blocks)


DIFFER = {0: LayerTarget(intermediate_size=256), 1: LayerTarget(no_attention=True)}
CASES = {
    "llama": _made("llama", rope_parameters=LLAMA3),
    "llama-tied": _made("llama", tie_word_embeddings=True),
    "llama-biased": _made("llama", **BIASED),
    "llama-narrow": _made("llama", Targets(hidden_size=96, intermediate_size=320)),
    "llama-shallow": _made("llama", Targets(drop_layers=(1,))),
    "mistral": _made("mistral", sliding_window=None),
    "mistral-few-heads": _made("mistral", Targets(num_attention_heads=2), sliding_window=None),
    "nemotron": _made("nemotron"),
    "nemotron-thin": _made("nemotron", Targets(intermediate_size=320)),
    "nemotron-narrow": _made("nemotron", Targets(hidden_size=96)),
    "nemotron-both": _made("nemotron", Targets(hidden_size=64, num_attention_heads=2)),
    "nemotron-tied": _made("nemotron", tie_word_embeddings=True),
    "nanochat": _made("nanochat"),
    "differ-pruned": _made("llama", Targets(per_layer=DIFFER)),
    "differ-narrow": _made("llama", Targets(hidden_size=96, per_layer=DIFFER)),
    "differ": _blocks(WHOLE, TWICE, block(None, 6.0), WHOLE),
    "differ-kv-heads": _blocks(WHOLE, block(4, 3.0), block(1, 6.0)),
    "differ-no-mlp": _blocks(WHOLE, block(2, None), TWICE),
    "differ-first-without": _blocks(block(None, 3.0), WHOLE, TWICE),
    "differ-first-without-unscaled": _blocks(block(None, 3.0), WHOLE, TWICE, rope_scaling=None),
    "differ-first-linear": _blocks(block("linear", 3.0), WHOLE, TWICE),
    "differ-first-empty": _blocks(block(None, None), WHOLE, TWICE),
    "differ-last-empty": _blocks(WHOLE, TWICE, block(None, None)),
    "differ-middle-empty": _blocks(WHOLE, block(None, None), TWICE),
    "differ-linear-attention": _blocks(WHOLE, block("linear", 3.0), TWICE),
    "differ-linear-mlp": _blocks(WHOLE, block(2, "linear"), TWICE),
}


@dataclass(frozen=True)
class Export:
    """A folder, the tokens that follow PROMPT, how far the second choice was at the closest of
    them, and what the table says of each reader."""

    folder: Path
    tokens: list[int]
    margin: float
    predicted: dict[str, str]


def make(case: Case, folder: Path) -> Export:
    """Save the model of a case as `folder/hf`, and export it."""
    (folder / "hf").mkdir(parents=True)
    _save(case, folder / "hf")
    return exported(folder / "hf", folder, case.targets)


def exported(hf: Path, folder: Path, targets: Targets | None = None) -> Export:
    """`folder/out`, by way of import (and pruning) and export."""
    import_checkpoint(hf, folder / "native", show_progress=False)
    native = folder / "native"
    if targets is not None:
        scores = random_scores(open_native(native).spec)
        prune(native, folder / "small", targets, scores=scores, show_progress=False)
        native = folder / "small"
    export_checkpoint(native, folder / "out", show_progress=False)
    opened = open_native(native)
    tokens, margin = greedy(native)
    predicted = readers(opened.spec, opened.manifest.family)
    return Export(folder / "out", tokens, margin, predicted)


def greedy(native: Path, prompt: list[int] = PROMPT, count: int = COUNT) -> tuple[list[int], float]:
    """Tokens of whole forward passes in fp32, and the least distance to a second choice."""
    decoder, _ = load_decoder(native, dtype=torch.float32)
    ids, margin = list(prompt), float("inf")
    for _ in range(count):
        with torch.no_grad():
            best = decoder.logits(torch.tensor([ids]))[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :], margin


def _save(case: Case, path: Path) -> None:
    if case.blocks:
        sizes = {k: SIZES[k] for k in ("vocab_size", "hidden_size", "num_attention_heads")}
        more = {"rope_scaling": OLD_LLAMA3, "max_position_embeddings": 256, "eos_token_id": 1}
        more |= {"auto_map": None, "bos_token_id": 0}
        save_llama_nemotron(path, list(case.blocks), **{**sizes, **more, **case.changes})
        write_remote_code(path)  # as published ones have code
    else:
        torch.manual_seed(0)
        model = MAKERS[case.maker](**{**SIZES, "head_dim": 32, **case.changes})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(parameter + noise * 0.1 if "norm" in name else noise * 0.15)
        model.save_pretrained(path)
    save_tokenizer(path)


def save_tokenizer(path: Path) -> None:
    """A byte-level tokenizer of VOCAB tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(t, special=True) for t in ("<s>", "</s>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(json.__file__).read_text()], trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    tokenizer.save(str(path / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    described |= {"eos_token": "</s>", "model_max_length": 256}
    (path / "tokenizer_config.json").write_text(json.dumps(described))
