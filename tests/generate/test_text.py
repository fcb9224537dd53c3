"""What a stream gives out adds up to the decoded whole, and is never half of anything."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from bevatron.generate.detokenize import UNKNOWN, TextStream, Vocabulary
from tests.generate.engine_models import tokenizer

PIECES = ["▁the", "▁a", "b", "c", "▁", "ä", "日", "▁x", ".", ","]


def with_byte_fallback() -> Tokenizer:
    """Decodes as sentencepiece's tokenizers do: bytes in runs, one leading space dropped."""
    names = ["<s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<s>"])
    return made


TOKENIZERS = {"byte-level": tokenizer(), "byte-fallback": with_byte_fallback()}


def streamed(text: TextStream, tokens: list[int]) -> list[str]:
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if text.stopped:
            return pieces
    return [*pieces, text.finish()]


def added(made: Any, prompt: list[int], tokens: list[int]) -> str:
    before = made.decode(prompt)
    whole = made.decode(prompt + tokens)
    if before.endswith(UNKNOWN) or not whole.startswith(before):
        return str(made.decode(tokens))
    return str(whole[len(before) :])


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_pieces_add_up_to_the_whole(kind: str, data: st.DataObject) -> None:
    made = TOKENIZERS[kind]
    ids = st.integers(0, made.get_vocab_size() - 1)
    prompt = data.draw(st.lists(ids, min_size=1, max_size=30))
    tokens = data.draw(st.lists(ids, max_size=150))
    # (A prompt that ends within a run of bytes has no text of its own to add to.)
    if kind == "byte-fallback":
        prompt.append(made.token_to_id("b"))
    pieces = streamed(TextStream(Vocabulary(made), prompt), tokens)
    assert "".join(pieces) == added(made, prompt, tokens)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(st.sampled_from("abc äöü€日本語😀👩‍👩‍👧."), max_size=40))
def test_no_piece_is_half_a_character(kind: str, text: str) -> None:
    made = TOKENIZERS[kind]
    if kind == "byte-level":
        tokens = made.encode(text).ids
    else:
        tokens = [made.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    prompt = [made.token_to_id("b")]
    pieces = streamed(TextStream(Vocabulary(made), prompt), tokens)
    assert "".join(pieces) == text
    assert not any(UNKNOWN in piece for piece in pieces)


@given(
    text=st.text(st.sampled_from("abc"), max_size=30),
    stops=st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=4), max_size=3),
)
def test_a_stop_string_is_cut_and_never_shown(text: str, stops: list[str]) -> None:
    made = TOKENIZERS["byte-level"]
    tokens = [made.token_to_id(letter) for letter in text]
    stream = TextStream(Vocabulary(made), tokens[:1] or [3], stops)
    shown = "".join(streamed(stream, tokens))
    # As soon as one is there, whichever that is.
    end = min((n for n in range(len(text) + 1) for s in stops if text[:n].endswith(s)), default=-1)
    if end < 0:
        assert shown == text
        assert not stream.stopped
    else:
        starts = [text.find(s) for s in stops if 0 <= text.find(s) <= end - len(s)]
        assert shown == text[: min(starts)]
        assert stream.stopped


def test_text_comes_as_soon_as_it_is_certain() -> None:
    made = TOKENIZERS["byte-level"]
    tokens = [made.token_to_id(letter) for letter in "aabcab"]
    stream = TextStream(Vocabulary(made), [3], ["abd"])
    assert [stream.add(token) for token in tokens] == ["", "a", "", "abc", "", ""]
    assert stream.finish() == "ab"
