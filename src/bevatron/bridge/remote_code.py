"""The modelling code that an exported Llama-Nemotron needs besides its weights; who reads it.

Neither transformers nor a package on PyPI has these classes. A folder that came without code of its
own gets `bevatron/hf.py` as `modeling_decilm.py`. That file needs nothing else of Bevatron; it is
copied and never imported here. Its last line states its version: a folder that carries an older
version of it gets the new one. Code of other authors, and an edited copy of ours, is kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import bevatron
from bevatron.checkpoint.strict_json import read_object
from bevatron.spec import MLP, Attention, ModelSpec

MODULE = "modeling_decilm"
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.DeciLMConfig",
    "AutoModel": f"{MODULE}.DeciLMModel",
    "AutoModelForCausalLM": f"{MODULE}.DeciLMForCausalLM",
    "AutoModelForSequenceClassification": f"{MODULE}.DeciLMForSequenceClassification",
    "AutoModelForTokenClassification": f"{MODULE}.DeciLMForTokenClassification",
    "AutoModelForQuestionAnswering": f"{MODULE}.DeciLMForQuestionAnswering",
}


# sha256 of bevatron/hf.py as it was before it had such a last line
UNMARKED = frozenset(
    (
        "4b04347db356f385b6c2c7d2232abbc3dcc348448553d846a5cb9d241e4c5166",
        "58b7c73d14d33822cfc48e3b45cc9a32bd0150053c04784a9ccab57e9a997b0b",
        "c3a86160d6f3aebd790e75d197fc8b34c7d1365bbe7e3a0e12b63539bb73be12",
        "eb250c1b8dcd17c4dd4ec96f948261049890a26cf4d5804cf78326ae269da02f",
        "e22fad16577ccb8950d88a69d1f2743d38368ce2ca4d93651384435ce6cda423",
    )
)
_MARK = re.compile(rb"# bevatron (\d+) [0-9a-f]{64}\n\Z")


def own_code() -> bytes:
    """bevatron/hf.py, as a folder is to carry it."""
    return Path(bevatron.__file__).with_name("hf.py").read_bytes()


def marked(code: bytes, version: int) -> bytes:
    """`code` with the last line by which `own_version` knows it: it holds a hash of the rest."""
    text = _MARK.sub(b"", code)
    return text + b"# bevatron %d %s\n" % (version, hashlib.sha256(text).hexdigest().encode())


def own_version(code: bytes) -> int | None:
    """Which version of bevatron/hf.py this is, byte for byte: 0 of those that had no last line of
    that kind. None if it is not ours, or was edited since."""
    code = code.replace(b"\r\n", b"\n")  # as git on Windows may have made them
    found = _MARK.search(code)
    if found is None:
        return 0 if hashlib.sha256(code).hexdigest() in UNMARKED else None
    version = int(found[1])
    return version if marked(code, version) == code else None


def is_outdated(file: Path) -> bool:
    """Whether the file is there, and is bevatron/hf.py of an earlier release."""
    if not file.is_file():
        return False
    found, ours = file.read_bytes(), own_code()
    version, current = own_version(found), own_version(ours)
    return version is not None and version <= (current or 0) and found != ours


def renew_own_code(folder: Path) -> list[str]:
    """Replace an earlier release's bevatron/hf.py in an HF folder; what to tell the user, if so."""
    file = folder / f"{MODULE}.py"
    if not is_outdated(file):
        return []
    file.write_bytes(own_code())
    return [f"{file.name}: {REPLACED}"]


REPLACED = "Bevatron's code of an earlier release was replaced by that of this one"


def write_remote_code(folder: Path) -> None:
    """Make the HF folder load with trust_remote_code=True, unless it has code already.

    A .py file that no auto_map names is no code of the model: transformers never looks at it."""
    config = read_object(folder / "config.json")
    if config.get("auto_map") or (folder / f"{MODULE}.py").exists():
        return
    (folder / f"{MODULE}.py").write_bytes(own_code())
    text = json.dumps({**config, "auto_map": AUTO_MAP}, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


READERS = ("vLLM", "SGLang", "TensorRT-LLM", "llama.cpp")


def wont_read(spec: ModelSpec) -> list[str]:
    """Which other programs will not read this model rightly as DeciLMForCausalLM, and why."""
    why = refusals(spec)
    return [f"{reader} will not read it: {'; '.join(reasons)}" for reader, reasons in why.items()]


def refusals(spec: ModelSpec) -> dict[str, list[str]]:
    """Reader -> why it will not read this model rightly as DeciLMForCausalLM.

    vLLM and llama.cpp were run (`make test-readers`); for the others their source was read, see
    docs/minitron.md."""
    layers = spec.layers
    first = next((x for x in layers if x.attention is not None or x.mlp is not None), layers[0])
    replaced = {place for x in layers for place, s in x.present if s.kind == "linear"}
    heads = {a.num_key_value_heads for _, a in spec.each(Attention)}
    why: dict[str, list[str]] = {}

    def refuses(reason: str, *readers: str) -> None:
        for reader in readers:
            why.setdefault(reader, []).append(reason)

    if replaced:
        refuses("sublayers are replaced by one matrix", "vLLM", "SGLang")
    if "mlp" in replaced:
        refuses("MLPs are replaced by one matrix", "llama.cpp")
    if first.attention is None or first.attention.kind != "attention":
        refuses("its first layer that is not empty has no attention", "vLLM", "SGLang")
    if len(heads) > 1:
        refuses(f"layers have different numbers of KV heads ({sorted(heads)})", "SGLang")
    if layers[0].attention is None:
        refuses("its first layer has no attention", "llama.cpp")
    if not _heads_fill_hidden(spec):
        refuses(_HEAD_DIM, "llama.cpp")
    if any(x.attention is not None and x.mlp is None for x in layers):
        refuses("layers have an attention and no MLP: it would be left out silently", "llama.cpp")
    elif layers[-1].mlp is None:
        refuses("its last layer is empty", "llama.cpp")
    if spec.rope.kind not in ("default", "linear", "llama3"):
        refuses(f"its rope is {spec.rope.kind}, which would be left out silently", "llama.cpp")
    if any(p.role == "bias" for p in spec.parameters()):
        refuses("it has biases", "TensorRT-LLM")
    if _mlp_biases(spec):
        refuses(_NO_MLP_BIAS, "SGLang")
    if spec.head.kind != "causal_lm":
        refuses(f"it has the head {spec.head.kind}", *READERS)
    return why


def readers(spec: ModelSpec, family: str) -> dict[str, str]:
    """What each of READERS makes of the export of this model: "yes", "yes, if" and what its
    tokenizer has to be, "no: " and what is in the way, or what else has to be known. How it is
    known, see `refusals`."""
    if family == "llama_nemotron":
        why = {reader: "; ".join(reasons) for reader, reasons in refusals(spec).items()}
        found = {reader: f"no: {why[reader]}" if reader in why else "yes" for reader in READERS}
        if found["llama.cpp"] == "yes" and spec.vocab_size != _DECILM_TOKENS:
            found["llama.cpp"] = _IF_TOKENIZER_OF_DECILM
        return found
    if family not in ("llama", "mistral", "nemotron", "nanochat"):
        return dict.fromkeys(READERS, f"not known: their classes for {family} were not looked at")
    if spec.head.kind != "causal_lm":
        return dict.fromkeys(READERS, f"not known: it has the head {spec.head.kind}")
    if family == "nanochat":
        none = "no: it has no class for NanoChatForCausalLM"
        return {"vLLM": _FALLBACK, "SGLang": _UNTRIED, "TensorRT-LLM": none, "llama.cpp": none}
    found = dict.fromkeys(READERS, "yes")
    if family == "nemotron":
        return found | {"SGLang": _UNTRIED, "llama.cpp": _llama_cpp_of_nemotron(spec)}
    if _mlp_biases(spec):
        found["SGLang"] = f"no: {_NO_MLP_BIAS}"
    if not _heads_fill_hidden(spec):
        found["llama.cpp"] = "since September 2024: head_dim is not hidden_size / heads"
    return found


_DECILM_TOKENS = 128256
_IF_TOKENIZER = "yes, if its converter takes the tokenizer: it reads"
_IF_TOKENIZER_OF_DECILM = (
    f"{_IF_TOKENIZER} a byte-level one of a DeciLM only with {_DECILM_TOKENS:,} tokens"
)
_HEAD_DIM = "head_dim is not hidden_size / num_attention_heads"
_NO_MLP_BIAS = "it has biases in the MLP, which would be left out silently"
_FALLBACK = "by its fallback to transformers' own class, for it has none"
_UNTRIED = f"{_FALLBACK}; not tried"


def _llama_cpp_of_nemotron(spec: ModelSpec) -> str:
    """Its converter writes no head_dim for this class, and loading then expects another."""
    reasons = []
    if not _heads_fill_hidden(spec):
        reasons.append(_HEAD_DIM)
    if spec.tied:
        reasons.append("it wants a head of its own, and this one is tied")
    if spec.rope.kind not in ("default", "linear"):
        reasons.append(f"its rope is {spec.rope.kind}")
    if reasons:
        return f"no: {'; '.join(reasons)}"
    return f"{_IF_TOKENIZER} tokenizer.model only of a Nemotron"


def _heads_fill_hidden(spec: ModelSpec) -> bool:
    h = spec.hidden_size
    return all(a.head_dim * a.num_attention_heads == h for _, a in spec.each(Attention))


def _mlp_biases(spec: ModelSpec) -> bool:
    return any(mlp.bias for _, mlp in spec.each(MLP))
