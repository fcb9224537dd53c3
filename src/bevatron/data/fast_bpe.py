"""Byte-level BPE of a tokenizer.json through tiktoken, where the ids are proven to be the same.

The two libraries merge by different rules: `tokenizers` follows a list of pairs, tiktoken merges
any two neighbours whose concatenation is in the vocabulary, by one rank per token. They agree if

1. every token that merges can make at all is made from its own bytes alone; the place in the list
   of the last merge on that way is the token's rank (`_ranks` derives each of them), and
2. both parts of that last merge have lower ranks.

Proof: suppose that the merges below rank R are exhausted, and two neighbours make up a token of
rank R. No merge has crossed their borders, so what happened between the borders is what happens to
the token's bytes alone: the neighbours are the two parts of its last merge. So tiktoken never finds
a pair that is not in the list, and never one out of order.

Before the merges, both libraries split the text by a regular expression, in two different engines.
Only syntax that means the same in both engines is accepted, and every class of characters in it is
compared over Unicode. At the end both libraries encode a corpus of strange strings and of the
user's own text, and the ids must be equal.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from unicodedata import category

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# A digit at a time first, then GPT2 between them: spaces before a digit are those before an end.
GPT2_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

CLASS = r"\[\^?(?:\\[pP]\{\w+\}|\\[^\w\[]|\\[sSdrnt]|[^\[\]\\&~])+\]|\\[pP]\{\w+\}|\\[sSd]"
SYNTAX = re.compile(
    rf"(?P<case>\(\?i:)|\(\?[:!=]|\((?!\?)|\)|\||(?P<class>{CLASS})|\\[rnt]|\\[^\w]|[?*+]"
    r"|\{\d+(?:,\d*)?\}(?!\+)|(?P<literal>[^\\\[\](){}?*+|.^$])"
)
# Runs of code points that have had one class ever since Unicode 6 (ideographs, Hangul), are private
# or unassigned: of these every 512th is compared, of all others each.
UNIFORM = (
    (0x3400, 0x4DB5),
    (0x4E00, 0x9FCB),
    (0xAC00, 0xD7A3),
    (0xD800, 0xF8FF),
    (0x20000, 0x2A6D6),
    (0x40000, 0xDFFFF),
    (0xE0200, 0x10FFFF),
)


class Unproven(Exception):
    """The fast path is not known to give the same ids; the argument says why."""


@dataclass(frozen=True)
class FastBpe:
    """What tiktoken needs, and how its ids become the tokenizer's.

    Attributes:
        tokens: by rank, as text of code points 0 to 255, which JSON can hold.
        ids: of the same tokens.
        needles: a text that holds one of these may hold an added token.
        unsafe: a regular expression of characters on which the engines may differ, or "".
        nfc: a text must be in this normal form.
    Texts to which one of the last three applies go through `tokenizers`.
    """

    pattern: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    needles: tuple[str, ...]
    unsafe: str
    nfc: bool

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> FastBpe:
        values: dict[str, Any] = json.loads(text)
        for name in ("tokens", "ids", "needles"):
            values[name] = tuple(values[name])
        return cls(**values)


def translate(data: Mapping[str, Any]) -> FastBpe:
    """What tokenizer.json says, for tiktoken. Raises Unproven."""
    try:
        pattern = _pattern(data.get("pre_tokenizer"))
        nfc = _is_nfc(data.get("normalizer"))
        tokens, ids = _vocabulary(data["model"])
        added = [str(token["content"]) for token in data.get("added_tokens") or ()]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise Unproven(f"tokenizer.json is of an unknown form ({error!r})") from error
    unsafe = compare_classes(pattern)
    if nfc:
        # Python's tables may be older than the library's: what they do not know is unsafe
        unsafe += "".join(c for c in map(chr, range(sys.maxunicode + 1)) if category(c) == "Cn")
    return FastBpe(pattern, tokens, ids, needles(added), _one_of(unsafe), nfc)


# ---------------------------------------------------------------------------------------------
# The parts of tokenizer.json
# ---------------------------------------------------------------------------------------------


def _is_nfc(normalizer: Any) -> bool:
    while normalizer and normalizer["type"] == "Sequence" and len(normalizer["normalizers"]) <= 1:
        normalizer = (normalizer["normalizers"] or [None])[0]
    if normalizer is None:
        return False
    if normalizer["type"] == "NFC":
        return True
    raise Unproven(f"it normalises text ({normalizer['type']})")


def _pattern(pre: Any) -> str:
    """One regular expression whose matches are the pieces that the pre-tokenizer makes."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre]
    kinds = [step["type"] if step else None for step in steps]
    if kinds[-1] != "ByteLevel":
        raise Unproven(f"its pre-tokenizer is {'+'.join(map(str, kinds))}, not ByteLevel")
    if steps[-1].get("add_prefix_space", True):
        raise Unproven("it adds a space before the text")
    splits = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and splits:
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and splits and steps[0].get("individual_digits"):
        return GPT2_DIGITS
    if kinds == ["Split", "ByteLevel"] and not splits:
        how = steps[0]["behavior"], bool(steps[0].get("invert", False))
        pattern = steps[0]["pattern"].get("Regex")
        if pattern and how in (("Isolated", False), ("Removed", True)):
            check_syntax(pattern)
            return str(pattern)
    raise Unproven(f"its pre-tokenizer is {'+'.join(map(str, kinds))} with other options")


def _vocabulary(model: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The tokens in tiktoken's order, and their ids."""
    if model.get("type", "BPE") != "BPE":
        raise Unproven(f"its model is {model['type']}, not BPE")
    if model.get("dropout"):
        raise Unproven("it drops merges at random")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise Unproven("it marks the parts of words")
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    vocab: Mapping[str, int] = model["vocab"]
    to_byte = byte_alphabet()
    if any(c not in vocab for c in to_byte):
        raise Unproven("its vocabulary lacks some of the 256 bytes")
    ranks, rest = _ranks(vocab, {(a, b): i for i, (a, b) in enumerate(pairs)}, to_byte)
    order = sorted(ranks, key=lambda token: ranks[token])
    singles = sorted(to_byte, key=lambda c: to_byte[c])
    if model.get("ignore_merges"):
        # A word that is in the vocabulary is its token, even if no merges lead to it
        made = {*singles, *order}
        for token in rest:
            if any(token[:i] in made and token[i:] in made for i in range(1, len(token))):
                raise Unproven(f"no merges lead to its token {token!r}, but tiktoken would make it")
    else:
        rest = []
    chosen = [*singles, *order, *rest]
    tokens = tuple("".join(chr(to_byte[c]) for c in token) for token in chosen)
    return tokens, tuple(vocab[token] for token in chosen)


def _ranks(
    vocab: Mapping[str, int], merges: Mapping[tuple[str, str], int], to_byte: Mapping[str, int]
) -> tuple[dict[str, int], list[str]]:
    """The place of each token's last merge, and the tokens that no merges make from their bytes."""
    known = set(to_byte)
    ranks: dict[str, int] = {}
    parts: dict[str, tuple[str, str]] = {}
    rest = []
    for token in vocab:
        if len(token) < 2 or not known.issuperset(token):  # a byte, or what no bytes are spelt as
            continue
        last = _derive(token, merges)
        if last is None:
            rest.append(token)
        else:
            ranks[token], parts[token] = last
    for token, pair in parts.items():
        if any(ranks.get(part, -1) >= ranks[token] for part in pair):
            raise Unproven(f"its merges make {token!r} before its parts")
    return ranks, rest


def _derive(
    token: str, merges: Mapping[tuple[str, str], int]
) -> tuple[int, tuple[str, str]] | None:
    """The place and the pair of the merge that completes a token's bytes, if they become one."""
    parts = list(token)
    never = len(merges)
    best, pair = never, ("", "")
    while len(parts) > 1:
        best, at = never, 0
        for i in range(len(parts) - 1):
            rank = merges.get((parts[i], parts[i + 1]), never)
            if rank < best:
                best, at = rank, i
        if best == never:
            return None
        pair = parts[at], parts[at + 1]
        parts[at : at + 2] = [pair[0] + pair[1]]
    return best, pair


def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers spell bytes (GPT-2's)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def needles(added: Sequence[str]) -> tuple[str, ...]:
    """Few strings, of which each of the added tokens holds at least one: common beginnings."""
    groups: dict[str, str] = {}
    for token in added:
        if token:
            old = groups.setdefault(token[:3], token)
            same = next(
                (i for i, (a, b) in enumerate(zip(old, token, strict=False)) if a != b), None
            )
            groups[token[:3]] = old[:same] if same is not None else min(old, token, key=len)
    return tuple(sorted(groups.values()))


# ---------------------------------------------------------------------------------------------
# Two engines of regular expressions
# ---------------------------------------------------------------------------------------------


def check_syntax(pattern: str) -> None:
    """Raise Unproven for what the engines may read differently: among others anchors, `.`, and a
    possessive {n,m}+, which is none in Ruby's syntax."""
    at = 0
    while at < len(pattern):
        match = SYNTAX.match(pattern, at)
        if match is None:
            raise Unproven(
                f"it splits by {pattern!r}, of which {pattern[at : at + 8]!r} is unknown"
            )
        at = match.end()


def _classes(pattern: str) -> Iterator[str]:
    """The classes of characters in a pattern, and what is matched without regard to case."""
    depth: int | None = None
    seen = set()
    run = ""
    for match in [*SYNTAX.finditer(pattern), None]:
        literal = match["literal"] if match else None
        if depth is not None and literal and literal.isalpha():
            run += literal
            continue
        for text in [run, *run]:
            if text:
                seen.add(f"(?i:{text})")
        run = ""
        if match is None:
            break
        text = match[0]
        if match["case"]:
            depth = 1 if depth is None else depth + 1
        elif depth is not None:
            depth += text.startswith("(")
            depth -= text == ")"
            depth = depth or None
        if match["class"]:
            seen.add(text if depth is None else f"(?i:{text})")
    yield from sorted(seen)


def compare_classes(pattern: str) -> str:
    """The characters that the two engines do not put into the same classes of the pattern."""
    return "".join(sorted(frozenset().union(*map(_differences, _classes(pattern)))))


@cache
def _differences(one: str) -> frozenset[str]:
    """The characters that match one class in one engine and not in the other."""
    from tiktoken import Encoding
    from tokenizers import Regex, normalizers

    singles = {bytes([i]): i for i in range(256)}
    core = Encoding("class", pat_str=f"(?:{one})+", mergeable_ranks=singles, special_tokens={})
    found = bytes(core.encode_ordinary(_characters())).decode()
    left = normalizers.Replace(Regex(f"(?:{one})+"), "").normalize_str(_characters())
    if len(found) + len(left) == len(_characters()) and set(found).isdisjoint(left):
        return frozenset()
    return frozenset(found) & frozenset(left) | frozenset(_characters()).difference(found, left)


@cache
def _characters() -> str:
    """Every character that may be in another class elsewhere, each once."""
    numbers: list[int] = []
    begin = 0
    for first, last in UNIFORM:
        numbers += range(begin, first)
        numbers += range(first if first != 0xD800 else 0xE000, last, 512)
        begin = last + 1
    return "".join(map(chr, numbers))


def _one_of(characters: str) -> str:
    """A regular expression of one of these characters."""
    runs: list[list[int]] = []
    for number in sorted(set(map(ord, characters))):
        if runs and runs[-1][1] + 1 == number:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    inside = "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in runs)
    return f"[{inside}]" if inside else ""
