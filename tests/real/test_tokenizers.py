"""Published tokenizers with the chat templates that they carry: we render and encode as
transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer

from bevatron.chat.chat_template import ChatTemplate, special_tokens
from tests.real import smollm2, tokenizers

CHAT: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": "Wie heißt die Hauptstadt von Frankreich?  日本 🙂\n\n\tx = 1234567",
    },
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Thank you!"},
]


def ours(folder: Path) -> ChatTemplate:
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return ChatTemplate({"default": config["chat_template"]}, tokenizer, special_tokens(config))


@pytest.mark.parametrize("name", ["smollm2", *tokenizers.PACKAGES])
def test_a_chat_has_the_text_and_the_ids_that_transformers_gives_it(name: str) -> None:
    folder = smollm2.folder() if name == "smollm2" else tokenizers.folder(name)
    template, theirs = ours(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for chat, prompt in ((CHAT, True), (CHAT[:2], False)):
        text = theirs.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
        assert CHAT[0]["content"] in text
        assert template.render(chat, add_generation_prompt=prompt) == text
        ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
        assert template.encode(chat, add_generation_prompt=prompt) == ids
