"""Reading a Hugging Face folder without trusting it: headers, names and other files, no tensors.

Weights are safetensors only; pickles are never opened. Files named in the index must lie in the
folder; symbolic links may lead only into the folder or into the blobs of the Hub cache that holds
it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bevatron.bridge.source_changes import Stamp, stamps
from bevatron.checkpoint.safetensors_file import Header, Stored, read_header
from bevatron.checkpoint.storage import is_url
from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import BevatronError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHER_WEIGHTS = (*PICKLES, ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".safetensors")
SKIPPED_FOLDERS = (".git", ".cache")
GENERATION_CONFIG = "generation_config.json"
# What a tokenizer consists of, and the token ids that generation ends with.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    GENERATION_CONFIG,
)


class SourceError(BevatronError):
    """A Hugging Face folder that is incomplete, damaged or unsafe."""


@dataclass(frozen=True)
class HFFolder:
    """What a Hugging Face folder holds.

    Attributes:
        name: the path or Hub id as the user gave it; `revision`: the commit, if from the Hub.
        headers: of every weight file, by its name, in order.
        others: files kept byte for byte, relative, with `/`; `folders`: their folders.
        skipped: relative path -> why it is not taken along.
        stamps: of all files that are read, taken before that.
    """

    path: Path
    name: str
    revision: str | None
    config: Mapping[str, Any]
    headers: Mapping[str, Header]
    others: tuple[str, ...]
    folders: tuple[str, ...]
    skipped: Mapping[str, str]
    stamps: Mapping[str, Stamp]

    def tensors(self) -> dict[str, tuple[str, Stored]]:
        """Every tensor: the file that holds it, and where."""
        return {
            name: (file, tensor)
            for file, header in self.headers.items()
            for name, tensor in header.tensors.items()
        }

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for h in self.headers.values() for t in h.tensors.values())


def open_hf(source: str | Path, revision: str | None = None) -> HFFolder:
    """Read an HF folder, or download a Hub id first. A path that exists is never looked up.

    Raises BevatronError for anything that is missing, damaged, contradictory or unsafe."""
    path, commit = locate(source, revision)
    before = stamps(path, SKIPPED_FOLDERS)
    config = read_config(path)
    headers = _read_headers(path)
    others, folders, skipped = _list_others(path, headers)
    read = {name: before[name] for name in (*headers, *others) if name in before}
    return HFFolder(path, str(source), commit, config, headers, others, folders, skipped, read)


def read_config(path: Path) -> dict[str, Any]:
    """The folder's config.json, strictly."""
    if not (path / "config.json").is_file():
        if (path / "manifest.json").is_file() or (path / "latest").is_file():
            raise SourceError(
                f"{path}: is a native checkpoint already, expected a Hugging Face folder"
            )
        check_kind(path)
        raise SourceError(f"{path}: has no config.json; expected a Hugging Face model folder")
    return read_object(confined(path, path / "config.json"))


# Files that tell another format's folder, what it is, and what to do with it.
_KINDS = (
    (
        "adapter_config.json",
        "is an adapter of peft, without the model that it belongs to",
        "begin a run with it (model.init: its model, adapter.init: this folder), or merge it with "
        "peft's merge_and_unload() and save_pretrained()",
    ),
    (
        "model_[0-9]*.pt",
        "is a checkpoint of nanochat, a PyTorch pickle, which is not opened",
        "make a Hugging Face folder of it with convert_nanochat_checkpoints.py (in transformers' "
        "repository, src/transformers/models/nanochat) and pass that; NanoChatForCausalLM has no "
        "place for parts that nanochat has added since (value embeddings, windows, lambdas)",
    ),
    (
        "consolidated*.pth",
        "is Meta's own format, PyTorch pickles, which are not opened",
        "take the Hugging Face files of the model, which lie one folder above on the Hub",
    ),
    (
        "*.distcp",
        "is a checkpoint of torch.distributed.checkpoint, whose metadata is a pickle",
        "save it as a Hugging Face folder with the program that wrote it",
    ),
    (
        "latest_checkpointed_iteration.txt",
        "is a checkpoint of Megatron-LM",
        "convert it to a Hugging Face folder with Megatron-Bridge",
    ),
    ("*.gguf", "holds GGUF, which is not read", "take the safetensors that it was made from"),
)


def check_kind(path: Path) -> None:
    """Say what a folder without config.json is, if its files tell."""
    for pattern, kind, advice in _KINDS:
        found = sorted(p.name for p in path.glob(pattern))
        if found:
            raise SourceError(f"{path}: {kind} ({shown(found, 2)}); {advice}")


def locate(source: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder that `source` means, and the commit if it came from the Hub."""
    path = Path(source)
    if os.path.lexists(path):
        if not path.is_dir():
            raise SourceError(f"{path}: is not a folder; expected a Hugging Face model folder")
        if revision is not None:
            raise SourceError(f"{path}: is a folder on disk, so --revision has no meaning; drop it")
        return path, _cache_commit(path)
    text = str(source)
    if is_url(text):
        raise SourceError(
            f"{text}: holds no native checkpoint; a Hugging Face folder must lie on disk or the Hub"
        )
    if not looks_like_hub_id(text):
        raise SourceError(f"{text}: does not exist; expected a folder or a Hub id such as org/name")
    return _download(text, revision)


def looks_like_hub_id(text: str) -> bool:
    """Whether it could be name or org/name on the Hub."""
    parts = text.split("/")
    return len(parts) in (1, 2) and all(
        part
        and not part.startswith((".", "~", "-"))
        and all(c.isalnum() or c in "-_." for c in part)
        for part in parts
    )


def _download(name: str, revision: str | None) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download

    ignored = [f"*{suffix}" for suffix in OTHER_WEIGHTS if suffix != ".safetensors"]
    ignored += ["original/*", "onnx/*", "*.tflite", "*.ot", "*.mlmodel*"]
    try:
        folder = Path(snapshot_download(name, revision=revision, ignore_patterns=ignored))
    except Exception as error:  # the Hub raises many kinds, requests' among them
        raise _not_downloaded(name, error) from error
    return folder, _cache_commit(folder)


def fetch_config(name: str, revision: str | None = None) -> Path:
    """config.json of a Hub id, downloaded alone. Raises SourceError."""
    if not looks_like_hub_id(name):
        raise SourceError(f"{name}: does not exist; expected a folder or a Hub id such as org/name")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:
        raise _not_downloaded(name, error) from error


def _not_downloaded(name: str, error: Exception) -> SourceError:
    first = (str(error).strip().splitlines() or [""])[0]
    return SourceError(
        f"{name}: no such folder, and it could not be downloaded from the Hugging Face Hub "
        f"({type(error).__name__}: {first}); check the name and the connection, or download "
        "it elsewhere with `hf download` and pass the folder"
    )


def _cache_commit(path: Path) -> str | None:
    """The commit, if the folder is a snapshot in a Hub cache."""
    return path.name if path.parent.name == "snapshots" and _blobs(path) is not None else None


def _blobs(path: Path) -> Path | None:
    """The blobs folder of the Hub cache of which `path` is a snapshot."""
    real = path.resolve()
    blobs = real.parent.parent / "blobs"
    return blobs if real.parent.name == "snapshots" and blobs.is_dir() else None


def confined(folder: Path, path: Path) -> Path:
    """`path`, if what it leads to lies in `folder` or in its Hub cache's blobs."""
    real, blobs = path.resolve(), _blobs(folder)
    if folder.resolve() in real.parents or (blobs is not None and real.parent == blobs):
        return path
    raise SourceError(
        f"{path}: is a symbolic link out of the folder (to {real}); copy the file into the folder"
    )


def _read_headers(path: Path) -> dict[str, Header]:
    index, single = path / INDEX, path / SINGLE
    if not index.exists():
        if not single.exists():
            raise _no_weights(path)
        return {SINGLE: read_header(confined(path, single))}
    wanted = _read_index(path, confined(path, index))
    if single.exists() and SINGLE not in wanted.values():
        raise SourceError(
            f"{path}: holds both {SINGLE} and {INDEX} that does not list it; remove the one that "
            "is not meant"
        )
    headers: dict[str, Header] = {}
    place: dict[str, str] = {}
    for file in sorted(set(wanted.values())):
        if not (path / file).is_file():
            raise SourceError(f"{path}: {INDEX} lists {file}, which is missing; download it again")
        headers[file] = read_header(confined(path, path / file))
        for name in headers[file].tensors:
            if name in place:
                raise SourceError(
                    f"{path}: tensor {name[:200]!r} is in both {place[name]} and {file}"
                )
            place[name] = file
    absent = [name for name, file in wanted.items() if place.get(name) != file]
    unlisted = [name for name in place if name not in wanted]
    if absent:
        raise SourceError(
            f"{path}: {INDEX} says that {wanted[absent[0]]} holds {shown(absent)}, but it does not"
        )
    if unlisted:
        raise SourceError(
            f"{path}: {place[unlisted[0]]} holds {shown(unlisted)}, which {INDEX} does not list"
        )
    return headers


def _read_index(path: Path, index: Path) -> dict[str, str]:
    """The weight_map, every file name in it a plain one."""
    wanted = read_object(index).get("weight_map")
    if not isinstance(wanted, dict) or not wanted:
        raise SourceError(f"{index}: has no weight_map; expected tensor names and their files")
    for name, file in wanted.items():
        plain = isinstance(file, str) and file == Path(file).name and file not in ("", ".", "..")
        if not plain or any(c in file for c in "\\/:") or not file.isprintable() or len(file) > 200:
            raise SourceError(
                f"{index}: places {name[:200]!r} in {file!r:.200}; expected the plain name of a "
                f"file in {path}, without folders"
            )
        if not file.endswith(".safetensors"):
            raise SourceError(
                f"{index}: places {name[:200]!r} in {file!r:.200}, which is not safetensors"
            )
    return wanted


def _no_weights(path: Path) -> SourceError:
    found = sorted(p.name for p in path.iterdir() if p.name.endswith(PICKLES))
    if found:
        return SourceError(
            f"{path}: holds its weights as PyTorch pickles only ({shown(found)}), which can run "
            "code when opened; convert them with transformers' save_pretrained, or download a "
            "revision with safetensors"
        )
    adapters = sorted(p.name for p in path.glob("adapter_model*"))
    if adapters:
        return SourceError(
            f"{path}: holds an adapter ({adapters[0]}) and no model; merge it into its base model"
        )
    return SourceError(f"{path}: holds neither {SINGLE} nor {INDEX}; it has no weights")


def shown(names: list[str], limit: int = 8) -> str:
    """A few names for a message, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(_printable(name[:200]) for name in names[:limit]) + more


def _printable(name: str) -> str:
    """Names come from strangers: none may break a line or speak to the terminal."""
    return name if name.isprintable() else repr(name)


def _list_others(
    path: Path, headers: Mapping[str, Header]
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]:
    """All files besides the weights: those to keep, their folders, and those skipped with why."""
    kept: list[str] = []
    folders: list[str] = []
    skipped: dict[str, str] = {}
    for root, names, files in os.walk(path):
        here = PurePosixPath(Path(root).relative_to(path).as_posix())
        for name in sorted(names):
            relative = str(here / name)
            if name in SKIPPED_FOLDERS:
                skipped[relative + "/"] = "bookkeeping of git or of a download"
            elif (path / relative).is_symlink():
                skipped[relative + "/"] = "a symbolic link to a folder"
            else:
                folders.append(relative)
        names[:] = sorted(n for n in names if str(here / n) in folders)
        for name in sorted(files):
            relative = str(here / name)
            if relative in headers:
                continue
            reason = _why_skipped(path / relative)
            if reason:
                skipped[relative] = reason
            else:
                confined(path, path / relative)
                kept.append(relative)
    return tuple(kept), tuple(folders), skipped


def _why_skipped(path: Path) -> str | None:
    if path.name.lower().endswith(OTHER_WEIGHTS):
        if path.name.lower().endswith(".safetensors"):
            return "safetensors that are not part of the model"
        return "weights in a format that is not read"
    if not path.is_file():
        return "not a file"
    return None
