"""tiktoken encodes only where it gives the ids that `tokenizers` gives; else it says why not."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from bevatron.data import fast_bpe
from bevatron.data import text_encoder as encoder_module
from bevatron.data.fast_bpe import (
    FastBpe,
    Unproven,
    byte_alphabet,
    check_syntax,
    needles,
    translate,
)
from bevatron.data.text_encoder import Encoder, FastEncoder, choose
from bevatron.errors import BevatronError

pytest.importorskip("tiktoken")

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NANOCHAT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'ll)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'ll)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> Any:
    from tokenizers import Regex

    steps = [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    return Sequence(steps)


PRE_TOKENIZERS = {
    "gpt2": ByteLevel(add_prefix_space=False),
    "digits": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama3": split(LLAMA3),
    "nanochat": split(NANOCHAT),
    "o200k": split(O200K),
}


def corpus() -> list[str]:
    """This test's own source, the encoder's strange strings, and a few languages."""
    texts = [Path(__file__).read_text(encoding="utf-8"), *encoder_module.STRANGE]
    texts += [
        "Füße naïve Ærø žluťoučký",
        "быстрая лиса перепрыгнула",
        "素早い茶色の狐が 123",
        "१२३ ४५६",
    ]
    return [t for t in texts if encoder_module._is_text(t)]


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json with one of the usual pre-tokenizers, two special tokens and one that is
    none; that of Llama 3 ignores merges, that of o200k normalises."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=request.param == "llama3"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[request.param]
    if request.param == "o200k":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens(["<think>"])
    file = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="module")
def both(trained: Path) -> tuple[Encoder, FastEncoder]:
    tokenizer = Tokenizer.from_file(str(trained))
    choice = choose("tiktoken", trained, tokenizer, [], None)
    assert choice.bpe is not None
    again = FastBpe.from_json(choice.bpe.to_json())
    assert again == choice.bpe
    return Encoder(tokenizer), FastEncoder(tokenizer, again)


def same(both: tuple[Encoder, FastEncoder], texts: list[str]) -> bool:
    (slow, a), (fast, b) = (one.encode(texts) for one in both)
    return a == b and np.array_equal(slow, fast)


@given(
    st.lists(
        st.one_of(
            st.text(max_size=30),
            st.text(" \t\n\r\u00a0ab'sS1२.!<|>", max_size=40),
            st.lists(st.sampled_from(["<|end|>", "<think>", "'LL", " ", "ſ", "é", "e\u0301"])).map(
                "".join
            ),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_the_ids_are_those_of_tokenizers(
    both: tuple[Encoder, FastEncoder], texts: list[str]
) -> None:
    assert same(both, texts)


def test_real_text_is_encoded_alike_and_by_tiktoken(both: tuple[Encoder, FastEncoder]) -> None:
    texts = [
        p.read_text(encoding="utf-8") for p in Path(encoder_module.__file__).parent.glob("*.py")
    ]
    assert same(both, texts)
    through = [both[1]._ranks(t) is not None for t in texts]
    assert sum(through) >= len(through) - 2  # an added token may stand in a docstring


def words(merges: list[tuple[str, str]], ignore: bool) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer with these merges, whatever sense they make, and no splitting into words."""
    vocab = {c: i for i, c in enumerate(byte_alphabet())}
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore))
    tokenizer.pre_tokenizer = split(r"\S+|\s+")
    return tokenizer, json.loads(tokenizer.to_str())


@pytest.mark.parametrize("ignore", [False, True])
def test_no_list_of_merges_is_taken_for_what_it_is_not(ignore: bool) -> None:
    """Random lists, most of them senseless: merges twice, in the wrong order, never reached. What
    passes gives the same ids for every string of up to seven letters."""
    rng = random.Random(0)
    texts = ["".join(t) for n in range(1, 8) for t in itertools.product("ab", repeat=n)]
    accepted = refused = 0
    for _ in range(150):
        known = ["a", "b"]
        merges: list[tuple[str, str]] = []
        for _ in range(rng.randint(2, 9)):
            pair = rng.choice(known), rng.choice(known)
            if pair not in merges and len(pair[0] + pair[1]) <= 6:
                merges.append(pair)
                known.append(pair[0] + pair[1])
        if rng.random() < 0.5:
            rng.shuffle(merges)
        tokenizer, data = words(merges, ignore)
        try:
            vocabulary = fast_bpe._vocabulary(data["model"])
        except Unproven:
            refused += 1
            continue
        accepted += 1
        fast = FastEncoder(tokenizer, FastBpe(r"\S+|\s+", *vocabulary, (), "", False))
        assert same((Encoder(tokenizer), fast), texts), merges
    assert accepted >= 30
    assert refused >= 10


def test_a_token_that_no_merge_makes_is_no_trap() -> None:
    """`abc` is in the vocabulary, but its bytes become `a` and `bc`, which tiktoken would join."""
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    tokenizer, data = words(merges, ignore=False)
    vocabulary = fast_bpe._vocabulary(data["model"])
    assert "abc" not in vocabulary[0]
    fast = FastEncoder(tokenizer, FastBpe(r"\S+|\s+", *vocabulary, (), "", False))
    assert same((Encoder(tokenizer), fast), ["abc", "xabc", "ababc"])
    _, data = words(merges, ignore=True)
    with pytest.raises(Unproven, match="no merges lead to its token 'abc'"):
        fast_bpe._vocabulary(data["model"])


def test_what_may_differ_is_refused_and_said(trained: Path) -> None:
    def change(**changes: Any) -> dict[str, Any]:
        return {**json.loads(trained.read_bytes()), **changes}

    model = change()["model"]
    few = {token: i for token, i in model["vocab"].items() if token != "Ġ"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"normalizer": {"type": "Lowercase"}}, "normalises text .Lowercase"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre-tokenizer is Metaspace"),
        ({"pre_tokenizer": None}, "pre-tokenizer is None"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "adds a space"),
        ({"model": {"type": "Unigram", "vocab": []}}, "is Unigram, not BPE"),
        ({"model": model | {"dropout": 0.1}}, "drops merges"),
        ({"model": model | {"end_of_word_suffix": "</w>"}}, "marks the parts"),
        ({"model": model | {"vocab": few}}, "lacks some of the 256 bytes"),
        ({"model": {"type": "BPE"}}, "unknown form"),
    ]
    for changes, message in cases:
        with pytest.raises(Unproven, match=message):
            translate(change(**changes))


@pytest.mark.parametrize(
    "pattern",
    [
        r"\p{N}{1,3}+",
        r"^a",
        r"a$",
        r".",
        r"(?<!a)b",
        r"\bword",
        r"\h+",
        r"[[:alpha:]]",
        r"(?m)x",
    ],
)
def test_syntax_that_engines_read_differently_is_unknown(pattern: str) -> None:
    with pytest.raises(Unproven, match="is unknown"):
        check_syntax(pattern)


def test_characters_on_which_the_engines_differ_go_to_tokenizers(trained: Path) -> None:
    tokenizer = Tokenizer.from_file(str(trained))
    bpe = translate(json.loads(trained.read_bytes()))
    unsafe = FastEncoder(tokenizer, FastBpe(**{**vars(bpe), "unsafe": "[\u4e00-\u9fff]"}))
    assert unsafe._ranks("abc äöü") is not None
    assert unsafe._ranks("abc 一") is None
    assert same((Encoder(tokenizer), unsafe), ["abc 一", "abc"])


def test_needles_find_every_added_token() -> None:
    added = ["<|begin|>", "<|end|>", "<|eot|>", "  ", "    ", "\n", "<think>", "<|end"]
    found = needles(added)
    assert all(any(n in token for n in found) for token in added)
    assert all(found)
    assert len(found) < len(added)


def test_a_text_that_the_pattern_does_not_cover_goes_to_tokenizers() -> None:
    """tiktoken drops what lies between matches."""
    tokenizer, data = words([("a", "a")], ignore=False)
    tokenizer.pre_tokenizer = split(r"\p{L}+")
    vocabulary = fast_bpe._vocabulary(data["model"])
    fast = FastEncoder(tokenizer, FastBpe(r"\p{L}+", *vocabulary, (), "", False))
    assert fast._ranks("aa!aa") is None
    assert same((Encoder(tokenizer), fast), ["aa!aa", "aaa"])


def test_the_engine_is_chosen_and_explained(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(trained))
    assert choose("tokenizers", trained, tokenizer, [], None).engine == "tokenizers"
    little = choose("auto", trained, tokenizer, [], 1000)
    assert (little.engine, little.why) == ("tokenizers", "under 16 MB of text")
    assert choose("auto", trained, tokenizer, ["some text"], None).engine == "tiktoken"
    other = tmp_path / "tokenizer.json"
    data = json.loads(trained.read_bytes())
    data["normalizer"] = {"type": "Lowercase"}
    other.write_text(json.dumps(data))
    lower = Tokenizer.from_file(str(other))
    chosen = choose("auto", other, lower, [], None)
    assert (chosen.engine, chosen.why) == ("tokenizers", "it normalises text (Lowercase)")
    with pytest.raises(BevatronError, match=r"not known to give the same ids .*Lowercase"):
        choose("tiktoken", other, lower, [], None)
    # A translation that is wrong in a way that no structure shows is found by comparing
    monkeypatch.setattr(fast_bpe, "_pattern", lambda pre: r"\p{L}+|[^\p{L}]+")
    chosen = choose("auto", trained, tokenizer, [], None)
    assert (chosen.engine, chosen.why) == ("tokenizers", "its ids differ on the comparison's text")
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    assert "not installed" in choose("auto", trained, tokenizer, [], None).why


def test_unicode_classes_are_compared() -> None:
    """The one class here that Oniguruma and Rust define differently is found to be so."""
    assert fast_bpe.compare_classes(LLAMA3) == ""
    assert fast_bpe.compare_classes(O200K) == ""
    differ = fast_bpe._differences(r"[[:print:]]")
    assert differ
    assert not any(c.isascii() and c.isprintable() for c in differ)
