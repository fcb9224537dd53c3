"""What `bevatron tokenizer` trains loads everywhere, loses no byte, and is the same each time."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer

from bevatron.bridge.open_weights import copy_tokenizer
from bevatron.chat.chat_template import ChatTemplate
from bevatron.cli.main import app
from bevatron.data.text_encoder import STRANGE, choose
from bevatron.data.token_store import TokenStore
from bevatron.data.tokenize import tokenize
from bevatron.data.tokenizer import open_tokenizer
from bevatron.data.tokenizer_training import NANOCHAT_TOKENS, train_tokenizer
from bevatron.errors import BevatronError

SIZE = 600
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "Sure?"},
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's documentation, in several formats."""
    folder = tmp_path_factory.mktemp("text")
    topics = list(pydoc_data.topics.topics.values())
    rows = "".join(json.dumps({"text": topic}) + "\n" for topic in topics[:40])
    (folder / "a.jsonl").write_text(rows)
    (folder / "b.txt").write_text("\n".join(topics[40:]))
    (folder / "c.bin").write_bytes(b"\0\1\2")
    return folder


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "tokenizer"
    made = train_tokenizer([text], path, vocab_size=SIZE)
    assert made.vocab_size == SIZE and 2 < made.bytes_per_token < 5
    assert made.documents == 41 and made.cut == 0 and made.skipped == {"binary": 1}
    return path


def test_every_text_comes_back_byte_for_byte(trained: Path, text: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    assert len(tokenizer) == SIZE
    characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x20000, 7)]))
    for one in (*STRANGE, characters, (text / "b.txt").read_text()):
        ids = tokenizer.encode(one, add_special_tokens=False)
        assert tokenizer.decode(ids) == one
    assert tokenizer.convert_ids_to_tokens(range(SIZE - 9, SIZE)) == list(NANOCHAT_TOKENS)
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == SIZE - 9
    assert [len(p) for p in _words(tokenizer, "12345 it's")] == [2, 2, 1, 3, 2]


def _words(tokenizer: Any, text: str) -> list[str]:
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [word for word, _ in split]


def test_chats_are_nanochats(trained: Path) -> None:
    """As NanoChat's `render_conversation` has them, with its mask, ours and transformers' alike."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    python = [
        {"type": "text", "text": "Let me see."},
        {"type": "python", "text": "2 + 3"},
        {"type": "python_output", "text": "5"},
        {"type": "text", "text": "5"},
    ]
    chat = [*CHAT, {"role": "assistant", "content": python}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == (
        "<|bos|><|user_start|>Be short.\n\nWhat is 2 + 3?<|user_end|>"
        "<|assistant_start|>It is 5.<|assistant_end|><|user_start|>Sure?<|user_end|>"
        "<|assistant_start|>Let me see.<|python_start|>2 + 3<|python_end|>"
        "<|output_start|>5<|output_end|>5<|assistant_end|>"
    )
    both = tokenizer.apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True, return_tensors=None
    )
    learned = [i for i, m in zip(both["input_ids"], both["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(learned) == (
        "It is 5.<|assistant_end|>Let me see.<|python_start|>2 + 3<|python_end|>5<|assistant_end|>"
    )
    encoder = Tokenizer.from_file(str(trained / "tokenizer.json"))
    source = (trained / "chat_template.jinja").read_text()
    ours = ChatTemplate({"default": source}, encoder, {"bos_token": "<|bos|>"})
    whole = chat[:3]
    ids, mask = ours.encode_with_mask(whole)
    theirs = tokenizer.apply_chat_template(
        whole, return_dict=True, return_assistant_tokens_mask=True, return_tensors=None
    )
    assert ids == theirs["input_ids"] and list(map(int, mask)) == theirs["assistant_masks"]
    ends = {tokenizer.convert_tokens_to_ids(t) for t in ("<|assistant_end|>", "<|bos|>")}
    assert ours.stop_tokens == ends
    for wrong in ([CHAT[0]], [{"role": "tool", "content": "x"}]):
        with pytest.raises(Exception, match=r"system message needs|no place for"):
            tokenizer.apply_chat_template(wrong, tokenize=False)


def test_tokenize_takes_it_by_both_engines(trained: Path, text: Path, tmp_path: Path) -> None:
    """Documents end with <|bos|>, which is what begins the next one in NanoChat's stream."""
    stores = [
        tokenize([text / "a.jsonl"], tmp_path / engine, tokenizer=trained, engine=engine)
        for engine in ("tokenizers", "tiktoken")
    ]
    assert isinstance(stores[0], TokenStore)
    assert (tmp_path / "tokenizers/tokens.bin").read_bytes() == (
        tmp_path / "tiktoken/tokens.bin"
    ).read_bytes()
    opened = open_tokenizer(trained)
    assert stores[0].info.eos_id == opened.encoder.token_to_id("<|bos|>")
    choice = choose("tiktoken", opened.file, opened.encoder, iter(["some text"]), None)
    assert choice.engine == "tiktoken"
    copy_tokenizer(trained, tmp_path / "source")
    kept = json.loads((tmp_path / "source/generation_config.json").read_text())
    assert kept["eos_token_id"] == [SIZE - 9, SIZE - 5]  # an export stops where an answer ends


def test_the_same_text_gives_the_same_bytes(trained: Path, text: Path, tmp_path: Path) -> None:
    """In another process with one thread, and with other hashes."""
    command = [sys.executable, "-m", "bevatron", "tokenizer", str(text), "again", "--json"]
    environment = {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7"}
    ran = subprocess.run(
        [*command, "--vocab-size", str(SIZE)],
        cwd=tmp_path, env=os.environ | environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(ran.stdout)["vocab_size"] == SIZE
    for file in trained.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_plain_style_bounds_and_refusals(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app(["tokenizer", str(text), str(tmp_path / "plain"), "--vocab-size", "300", "--style", "plain",
         "--max-document", "500", "--max-characters", "9000", "--json"],
        standalone_mode=False)  # fmt: skip
    made = json.loads(capsys.readouterr().out)
    assert made["characters"] == 9000 and made["cut"] > 5
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer.eos_token_id == 299 and tokenizer.bos_token is None
    assert _words(tokenizer, "12345") == ["123", "45"]
    before = sorted(p.name for p in tmp_path.iterdir())
    (tmp_path / "empty.txt").touch()
    for source, size, words in (
        (text, 60000, r"characters of text have pairs for \d+ tokens only"),
        (text, 265, "leave no place for a merge; use at least 266"),
        (tmp_path / "empty.txt", 300, "no text found"),
        (tmp_path / "nothing", 300, "does not exist"),
    ):
        with pytest.raises(BevatronError, match=words):
            train_tokenizer([source], tmp_path / "made", vocab_size=size)
    with pytest.raises(BevatronError, match="already exists"):
        train_tokenizer([text], tmp_path / "plain", vocab_size=300)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "empty.txt"])
