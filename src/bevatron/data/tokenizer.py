"""A tokenizer, read from its tokenizer.json, and the token ids that begin and end a document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bevatron.checkpoint.read_boxes import hash_bytes
from bevatron.checkpoint.run_folder import is_native, resolve
from bevatron.checkpoint.strict_json import read_object
from bevatron.data.token_store import StoreError, TokenStore
from bevatron.errors import BevatronError

TOKENIZER = "tokenizer.json"
OWN_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
CONFIGS = ("generation_config.json", "config.json", *OWN_CONFIGS)
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class OpenTokenizer:
    """A tokenizer and what a token store records of it.

    Attributes:
        name: the path or Hub id as the user gave it; `file`: its tokenizer.json.
        fingerprint: `xxh3:...` of the bytes of tokenizer.json; `encoding`: of what in it decides
            the ids, whatever else was changed by saving it anew.
        vocab_size: one more than the largest id, added tokens included.
        eos_id, bos_id, pad_id: of the first of CONFIGS beside tokenizer.json that names one, or
            None.
    """

    name: str
    file: Path
    encoder: Tokenizer
    fingerprint: str
    encoding: str
    vocab_size: int
    eos_id: int | None
    bos_id: int | None
    pad_id: int | None = None


def open_tokenizer(source: str | Path) -> OpenTokenizer:
    """Open a tokenizer for text of any length: truncation and padding are switched off.

    Args:
        source: HF folder, native checkpoint or run (its source/ folder), a tokenizer.json, or a
            Hub id, of which only tokenizer.json and CONFIGS are downloaded.
    Raises BevatronError if there is none or it cannot be read.
    """
    file = _locate(source)
    encoder, data = read_encoder(file), file.read_bytes()
    ids = encoder.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise BevatronError(f"{file}: has an empty vocabulary; expected at least one token")
    size = max(ids) + 1
    eos, bos, pad = (special_id(file, encoder, kind) for kind in ("eos", "bos", "pad"))
    return OpenTokenizer(
        str(source), file, encoder, hash_bytes(data), _encoding(encoder), size, eos, bos, pad
    )


def read_encoder(file: Path) -> Tokenizer:
    """A tokenizer.json, for text of any length: some have truncation or padding from training.

    Raises BevatronError if it cannot be read."""
    try:
        encoder = Tokenizer.from_str(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise BevatronError(f"{file}: cannot be read ({error.strerror})") from error
    except Exception as error:  # the library raises plain Exception
        raise BevatronError(
            f"{file}: is no tokenizer that the tokenizers library can read ({error}); expected the "
            "tokenizer.json of a Hugging Face folder"
        ) from error
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def fingerprint(source: str | Path) -> str:
    """`xxh3:...` of a tokenizer's tokenizer.json, without opening it."""
    return hash_bytes(_locate(source).read_bytes())


def _encoding(encoder: Tokenizer) -> str:
    """The hash of what decides the ids, as this version of the library spells it."""
    raw = json.loads(encoder.to_str())
    decides = {
        key: raw.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")
    }
    return hash_bytes(json.dumps(decides, sort_keys=True).encode())


def _locate(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if not path.exists():
        return _download(str(source))
    folders = [path, path / "source"]
    if is_native(path):
        folders.append(resolve(path) / "source")
    for folder in folders:
        if (folder / TOKENIZER).is_file():
            return folder / TOKENIZER
    raise BevatronError(
        f"{path}: has no {TOKENIZER}, nor has its source folder{missing(folders)}; pass a Hugging "
        f"Face folder, a native checkpoint, a run, a {TOKENIZER} or a Hub id as the tokenizer"
    )


OLDER = ("tokenizer.model", "vocab.json", "vocab.txt")


def missing(folders: Iterable[Path]) -> str:
    """What to do where a tokenizer lies in an older form only, in brackets; else nothing."""
    for folder in folders:
        found = next((name for name in OLDER if (folder / name).is_file()), None)
        if found is not None:
            return (
                f' (only {found}: transformers makes one of it, `python -c "from transformers '
                "import AutoTokenizer as A; A.from_pretrained('MODEL').save_pretrained('MODEL')\"`)"
            )
    return ""


def _download(name: str) -> Path:
    if not HUB_ID.fullmatch(name):
        raise BevatronError(
            f"{name}: does not exist; expected a folder, a {TOKENIZER} or a Hub id such as org/name"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = Path(hf_hub_download(name, TOKENIZER))
        for config in CONFIGS:
            with suppress(EntryNotFoundError):  # none of them is required
                hf_hub_download(name, config)
    except Exception as error:  # the Hub raises many kinds
        first = (str(error).strip().splitlines() or [""])[0]
        raise BevatronError(
            f"{name}: no such folder, and its {TOKENIZER} could not be downloaded from the Hugging "
            f"Face Hub ({type(error).__name__}: {first}); check the name and the connection, or "
            "pass a folder"
        ) from error
    return file


def special_id(
    file: Path, encoder: Tokenizer, kind: str, names: Sequence[str] = CONFIGS
) -> int | None:
    """The id for `eos`, `bos` or `pad`, from the first of `names` beside tokenizer.json that has
    one. Raises BevatronError if it is not a token's; as padding, which is only needed where
    examples are filled up, such an id counts as none."""
    size = max(encoder.get_vocab(with_added_tokens=True).values()) + 1
    for name in names:
        path = file.parent / name
        if not path.is_file():
            continue
        found = _named(read_object(path), encoder, kind)
        if found is None:
            continue
        if not 0 <= found < size and kind == "pad":
            continue  # -1 is how publishers say that there is none
        if not 0 <= found < size:
            raise BevatronError(
                f"{path}: {kind}_token_id is {found}, {file} has ids 0 to {size - 1}; correct it, "
                "or pass the tokenizer that belongs to it"
            )
        return found
    return None


def _named(config: Mapping[str, Any], encoder: Tokenizer, kind: str) -> int | None:
    ids = config.get(f"{kind}_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    if isinstance(first, int) and not isinstance(first, bool):
        return first
    token = config.get(f"{kind}_token")
    if isinstance(token, dict):
        token = token.get("content")
    return encoder.token_to_id(token) if isinstance(token, str) else None


def check_made_with(store: TokenStore, file: Path | None, model: Path, otherwise: str = "") -> None:
    """Refuse tokens of another tokenizer than the model's, if it has one: they mean other text.

    Args:
        file: the model's tokenizer.json; `model`: where it lies, and what else could be done, for
            the message.
    Raises StoreError."""
    if file is None:
        return
    own, info = open_tokenizer(file), store.info
    if not store.made_with(own.fingerprint, own.encoding):
        raise StoreError(
            f"{store.path}: was made with the tokenizer {info.tokenizer} ({info.fingerprint}), the "
            f"model's is {own.file} ({own.fingerprint}); make it anew with `bevatron tokenize "
            f"--tokenizer {model}`{otherwise}"
        )
