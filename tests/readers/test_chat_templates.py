"""Published chat templates, as trl ships them, render here as in transformers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bevatron.chat.chat_template import ChatTemplate
from tests.chat.chat_templates import tokenizer
from tests.chat.test_chat_templates import ANSWER, CALL, RESULT, SYSTEM, TOOL, USER

TRL = find_spec("trl")
FOLDER = Path(next(iter(TRL.submodule_search_locations or [""]))) if TRL else Path("nowhere")
TEMPLATES = sorted((FOLDER / "chat_templates").glob("*.jinja"))
TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|eot_id|>")
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, USER, ANSWER],
    "tools": [USER, CALL, {**RESULT, "name": "weather"}, {"role": "assistant", "content": "Warm."}],
    "reasoned": [USER, {"role": "assistant", "content": "4", "reasoning_content": "hm"}, USER],
}
# They want content as a list of parts, which here is one text; their system turn gets lost.
PARTS = ("idefics3", "smolvlm")


@pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_published_templates_render_as_in_transformers(path: Path) -> None:
    """Whatever transformers can render; text, ids and, where the template marks it, the mask."""
    import transformers

    source, made = path.read_text(), tokenizer(TOKENS)
    ours = ChatTemplate({"default": source}, made, {"bos_token": "<s>", "eos_token": "</s>"})
    them = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=source
    )
    compared = 0
    for name, chat in CHATS.items():
        if name == "system" and path.stem.startswith(PARTS):
            continue
        for tools in (None, [TOOL]) if ours.takes_tools else (None,):
            asked: dict[str, Any] = {"tools": tools, "add_generation_prompt": False}
            try:
                want = them.apply_chat_template(chat, tokenize=False, **asked)
            except Exception:
                continue
            assert ours.render(chat, **asked) == want, name
            masked = {"return_dict": True, "return_assistant_tokens_mask": True}
            coded = them.apply_chat_template(chat, **asked, **masked)
            ids, mask = ours.encode_with_mask(chat, tools=tools)
            assert ids == coded["input_ids"], name
            assert mask == [bool(part) for part in coded["assistant_masks"]], name
            compared += 1
    assert compared
