"""Training a byte-level BPE tokenizer on text: `bevatron tokenizer TEXT... DST --vocab-size N`.

A text is split into words by a regular expression, words into bytes, and the pair of neighbours
that is most frequent becomes a token until there are enough (Sennrich et al., arXiv 1508.07909, on
bytes as in GPT-2). The `tokenizers` library does it. Every text can be encoded, and comes back byte
for byte. What is read is what `bevatron tokenize` reads; memory holds the different words of it and
never the text. The same text gives the same tokenizer, whatever the number of threads.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bevatron.checkpoint.new_folder import check_target, new_folder
from bevatron.data.file_formats import KNOWN
from bevatron.data.text_documents import Unfit, utf8_bytes
from bevatron.data.text_encoder import STRANGE
from bevatron.data.tokenize_part import item_pieces
from bevatron.data.tokenize_sources import Part, plan
from bevatron.data.tokenizer import TOKENIZER
from bevatron.errors import BevatronError
from bevatron.progress import progress

BYTES = 256
MAX_CHARACTERS = 2_000_000_000  # NanoChat's
BATCH = 1 << 20  # characters that go to the library at once
SAMPLES, SAMPLE = 512, 1 << 14  # texts, spread over all, on which the result is measured

# GPT-4's (cl100k_base of openai/tiktoken), and NanoChat's: two digits at most rather than three, so
# that a small vocabulary is not spent on numbers.
GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
NANOCHAT_SPLIT = GPT4.replace("{1,3}", "{1,2}")

NANOCHAT_TOKENS = (
    "<|bos|>",  # begins every document, and so ends the one before it
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# As `render_conversation` of NanoChat's tokenizer.py renders it. Within `generation` is what is
# learned: the assistant's text, its Python and the end of its turn, but not what Python answered.
NANOCHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' and loop.first -%}
{%- set ns.system = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '<|user_start|>' + ns.system + message['content'] + '<|user_end|>' -}}
{%- set ns.system = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{- '<|assistant_start|>' -}}
{%- if message['content'] is string -%}
{%- generation -%}{{- message['content'] + '<|assistant_end|>' -}}{%- endgeneration -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{%- generation -%}{{- part['text'] -}}{%- endgeneration -%}
{%- elif part['type'] == 'python' -%}
{%- generation -%}{{- '<|python_start|>' + part['text'] + '<|python_end|>' -}}{%- endgeneration -%}
{%- elif part['type'] == 'python_output' -%}
{{- '<|output_start|>' + part['text'] + '<|output_end|>' -}}
{%- else -%}
{{- raise_exception('unknown part of a message: ' ~ part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- generation -%}{{- '<|assistant_end|>' -}}{%- endgeneration -%}
{%- endif -%}
{%- else -%}
{{- raise_exception('no place for a message of the role ' ~ message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if ns.system -%}
{{- raise_exception('a system message needs a user message after it') -}}
{%- endif -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Style:
    """What is around the merges.

    Attributes:
        specials: the last ids, in this order.
        begin: goes before a text that is encoded with special tokens.
        ends: what ends a document (the first) or an answer; `end`: which of them is eos_token.
    """

    split: str
    specials: tuple[str, ...]
    begin: str | None
    ends: tuple[str, ...]
    end: str
    template: str | None = None


StyleName = Literal["nanochat", "plain"]
STYLES: dict[str, Style] = {
    "nanochat": Style(
        NANOCHAT_SPLIT,
        NANOCHAT_TOKENS,
        "<|bos|>",
        ("<|bos|>", "<|assistant_end|>"),
        "<|assistant_end|>",
        NANOCHAT_TEMPLATE,
    ),
    "plain": Style(GPT4, ("<|endoftext|>",), None, ("<|endoftext|>",), "<|endoftext|>"),
}


@dataclass(frozen=True)
class Trained:
    """What a training of a tokenizer came to.

    Attributes:
        characters, documents: that were learned from; `cut`: documents of which the end was not.
        bytes_per_token: of samples spread over the text.
        skipped: files that are no text, and why.
    """

    path: str
    vocab_size: int
    style: str
    documents: int
    characters: int
    cut: int
    bytes_per_token: float
    seconds: float
    skipped: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def train_tokenizer(
    sources: Sequence[str | Path],
    dst: Path,
    *,
    vocab_size: int,
    style: str = "nanochat",
    max_characters: int = MAX_CHARACTERS,
    max_document: int | None = None,
    overwrite: bool = False,
    text_field: str = "text",
    split: str | None = None,
    as_text: Collection[str] = (),
    leave_out: Collection[str] = (),
) -> Trained:
    """Write the folder `dst` of a tokenizer: tokenizer.json, tokenizer_config.json,
    generation_config.json (what ends documents and answers) and, if the style has one,
    chat_template.jinja.

    Args:
        sources, text_field, split, as_text, leave_out: as `data.tokenize.tokenize` takes them.
        vocab_size: tokens in all: 256 bytes, merges, special tokens.
        max_characters: no more is read; `max_document`: no more of one document.
    Raises BevatronError, and leaves nothing at `dst`, for sources that cannot be read, for a
    `vocab_size` that has no place for bytes and special tokens, and where the text has too few
    different pairs to fill it: a pair that occurs once teaches nothing.
    """
    began = time.perf_counter()
    kind = STYLES[style]
    least = BYTES + len(kind.specials) + 1
    if vocab_size < least:
        raise BevatronError(
            f"--vocab-size {vocab_size}: {BYTES} bytes and {len(kind.specials)} special tokens "
            f"leave no place for a merge; use at least {least}"
        )
    check_target(dst, overwrite=overwrite)
    for source in sources:
        check_target(dst, overwrite=overwrite, apart_from=Path(source))
    skipped: Counter[str] = Counter()
    parts = plan(
        sources, skipped, split=split, text_field=text_field, as_text=as_text, leave_out=leave_out
    )
    text = _Text(parts, text_field, skipped, max_characters, max_document)
    made = _trained(text, kind, vocab_size - len(kind.specials))
    if not text.characters:
        raise BevatronError(
            f"{', '.join(map(str, sources)) or 'no source'}: no text found; expected {KNOWN}"
        )
    found = made.get_vocab_size()
    if found < vocab_size - len(kind.specials):
        raise BevatronError(
            f"--vocab-size {vocab_size}: {text.characters:,} characters of text have pairs for "
            f"{found + len(kind.specials)} tokens only; give more text, or a smaller vocabulary"
        )
    _finish(made, kind)
    bytes_per_token = _measured(made, text.samples)
    with new_folder(dst, overwrite=overwrite) as folder:
        _write(folder, made, kind)
    return Trained(
        path=str(dst),
        vocab_size=made.get_vocab_size(),
        style=style,
        documents=text.documents,
        characters=text.characters,
        cut=text.cut,
        bytes_per_token=round(bytes_per_token, 4),
        seconds=round(time.perf_counter() - began, 3),
        skipped=dict(+skipped),
    )


class _Text:
    """Reads all text once, in batches. Counts what it gives, and keeps some of it."""

    def __init__(
        self,
        parts: Sequence[Part],
        field: str,
        skipped: Counter[str],
        most: int,
        most_of_one: int | None,
    ) -> None:
        self.parts, self.field, self.skipped = parts, field, skipped
        self.most, self.most_of_one = most, most_of_one
        self.characters = self.documents = self.cut = 0
        self.samples: list[str] = []
        self._every, self._seen = 1, 0

    def batches(self) -> Iterator[list[str]]:
        total = sum(part.nbytes for part in self.parts)
        with progress("reading", total=total or None, unit="B") as advance:
            batch: list[str] = []
            size = 0
            for text in self._texts():
                batch.append(text)
                size += len(text)
                if size >= BATCH:
                    yield batch
                    advance(sum(map(utf8_bytes, batch)), documents=self.documents)
                    batch, size = [], 0
            if batch:
                yield batch

    def _texts(self) -> Iterator[str]:
        taken = 0  # of this document
        for part in self.parts:
            for item in part.items:
                try:
                    for piece in item_pieces(item, self.field, self.skipped):
                        text = piece.text
                        if self.most_of_one is not None:
                            text = text[: max(0, self.most_of_one - taken)]
                        text = text[: self.most - self.characters]
                        taken += len(piece.text)
                        self.characters += len(text)
                        if text:
                            self._sample(text)
                            yield text
                        if piece.ends:
                            self.documents += 1
                            self.cut += self.most_of_one is not None and taken > self.most_of_one
                            taken = 0
                        if self.characters >= self.most:
                            return
                except Unfit as error:
                    self.skipped[str(error)] += 1

    def _sample(self, text: str) -> None:
        """Keep every so many texts, ever fewer of them, so that they are spread over all."""
        if self._seen % self._every == 0:
            self.samples.append(text[:SAMPLE])
        self._seen += 1
        if len(self.samples) == 2 * SAMPLES:
            self.samples = self.samples[::2]
            self._every *= 2


def _trained(text: _Text, style: Style, size: int) -> Tokenizer:
    """Bytes and merges, without special tokens: `size` of them, or fewer."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(style.split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    made.train_from_iterator(text.batches(), trainer)
    return made


def _finish(made: Tokenizer, style: Style) -> None:
    made.add_special_tokens(list(style.specials))
    if style.begin is not None:
        token = (style.begin, made.token_to_id(style.begin))
        made.post_processor = processors.TemplateProcessing(
            single=f"{style.begin} $A", pair=f"{style.begin} $A $B", special_tokens=[token]
        )


def _measured(made: Tokenizer, samples: Sequence[str]) -> float:
    """Bytes per token of the samples, all of which come back as they were, strange strings too."""
    nbytes = tokens = 0
    for text in (*samples, *STRANGE):
        ids = made.encode(text, add_special_tokens=False).ids
        back = made.decode(ids, skip_special_tokens=False)
        assert back == text, f"{text[:80]!r} came back as {back[:80]!r}"
        if text not in STRANGE:
            nbytes, tokens = nbytes + utf8_bytes(text), tokens + len(ids)
    return nbytes / max(1, tokens)


def _write(folder: Path, made: Tokenizer, style: Style) -> None:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": style.end,
        "pad_token": style.ends[0],
    }
    if style.begin is not None:
        config["bos_token"] = style.begin
    ends: list[int | None] = [made.token_to_id(token) for token in style.ends]
    ids: dict[str, Any] = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    ids["pad_token_id"] = ends[0]
    if style.begin is not None:
        ids["bos_token_id"] = made.token_to_id(style.begin)
    (folder / TOKENIZER).write_text(made.to_str(pretty=True) + "\n", encoding="utf-8")
    for name, value in (("tokenizer_config.json", config), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    if style.template is not None:
        (folder / "chat_template.jinja").write_text(style.template, encoding="utf-8")
