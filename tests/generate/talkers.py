"""Tiny models with a tokenizer and a chat template, as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.bridge.hf_folders import llama, nanochat
from tests.chat.chat_templates import SPECIALS, reference, save_tokenizer, tokenizer


def make_talker(
    folder: Path, template: str = "llama31", context: int = 4096, **generation: Any
) -> Path:
    """Random weights that never choose a special token, so that an answer is as long as allowed.

    `generation`: what its generation_config.json says."""
    torch.manual_seed(1)
    maker = nanochat if template == "nanochat" else llama
    sizes = {"vocab_size": tokenizer().get_vocab_size(), "max_position_embeddings": context}
    model = maker(**sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.lm_head.weight[[tokenizer().token_to_id(name) for name in SPECIALS]] = 0
    model.save_pretrained(folder)
    save_tokenizer(folder, template)
    eos = tokenizer().token_to_id("<|eot_id|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, **generation}))
    return folder


def answer_of_transformers(folder: Path, ids: list[int], new: int) -> list[int]:
    """Greedy."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)
    return list(out[0, len(ids) :].tolist())


def make_parrot(folder: Path, chats: list[list[dict[str, Any]]], **options: Any) -> Path:
    """A model that has learnt these chats by heart: it says what the assistant says in them."""
    torch.manual_seed(0)
    kwargs = {"vocab_size": tokenizer().get_vocab_size(), "max_position_embeddings": 1024}
    model = llama(**kwargs, hidden_size=64, intermediate_size=128)
    template = reference("llama_nemotron")
    ids = [template.apply_chat_template(chat, **options)["input_ids"] for chat in chats]
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in ids])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    loss = torch.tensor(9.0)
    for _ in range(300):
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    assert loss < 0.1
    model.save_pretrained(folder)
    save_tokenizer(folder, "llama_nemotron")
    eos = tokenizer().token_to_id("<|eot_id|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder
