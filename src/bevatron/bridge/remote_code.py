"""What an export of a Llama-Nemotron needs besides weights: code, and knowing who reads it.

Neither transformers nor a package on PyPI has these classes. A folder that came without code of its
own gets `bevatron/hf.py` as `modeling_decilm.py`, which stands alone; it is copied as a file and
never imported here.
"""

from __future__ import annotations

import json
from pathlib import Path

import bevatron
from bevatron.checkpoint.strict_json import read_object
from bevatron.spec.model import MLP, Attention, Linear, ModelSpec

MODULE = "modeling_decilm"
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.DeciLMConfig",
    "AutoModel": f"{MODULE}.DeciLMModel",
    "AutoModelForCausalLM": f"{MODULE}.DeciLMForCausalLM",
    "AutoModelForSequenceClassification": f"{MODULE}.DeciLMForSequenceClassification",
    "AutoModelForTokenClassification": f"{MODULE}.DeciLMForTokenClassification",
    "AutoModelForQuestionAnswering": f"{MODULE}.DeciLMForQuestionAnswering",
}


def write_remote_code(folder: Path) -> None:
    """Make the HF folder load with trust_remote_code=True, unless it has code already.

    A .py file that no auto_map names is no code of the model: transformers never looks at it."""
    config = read_object(folder / "config.json")
    if config.get("auto_map") or (folder / f"{MODULE}.py").exists():
        return
    code = Path(bevatron.__file__).with_name("hf.py")
    (folder / f"{MODULE}.py").write_bytes(code.read_bytes())
    text = json.dumps({**config, "auto_map": AUTO_MAP}, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def wont_read(spec: ModelSpec) -> list[str]:
    """Which other programs will not read this model rightly as DeciLMForCausalLM, and why."""
    why = refusals(spec)
    return [f"{reader} will not read it: {'; '.join(reasons)}" for reader, reasons in why.items()]


def refusals(spec: ModelSpec) -> dict[str, list[str]]:
    """Reader -> why it will not read this model rightly as DeciLMForCausalLM.

    From their source (`nemotron_nas.py` of vLLM, SGLang and TensorRT-LLM; `convert_hf_to_gguf.py`),
    not from running them."""
    layers = spec.layers
    attentions = [layer.attention for layer in layers if isinstance(layer.attention, Attention)]
    first = next((x for x in layers if x.attention is not None or x.mlp is not None), layers[0])
    linear = any(isinstance(s, Linear) for x in layers for s in (x.attention, x.mlp))
    heads = {a.num_key_value_heads for a in attentions}
    why: dict[str, list[str]] = {}

    def refuses(reason: str, *readers: str) -> None:
        for reader in readers:
            why.setdefault(reader, []).append(reason)

    if linear:
        refuses("sublayers are replaced by one matrix", "vLLM", "SGLang", "llama.cpp")
    if not isinstance(first.attention, Attention):
        refuses("its first layer that is not empty has no attention", "vLLM", "SGLang")
    if len(heads) > 1:
        refuses(f"layers have different numbers of KV heads ({sorted(heads)})", "SGLang")
    if any(a.head_dim * a.num_attention_heads != spec.hidden_size for a in attentions):
        refuses("head_dim is not hidden_size / num_attention_heads", "llama.cpp")
    if any(p.role == "bias" for p in spec.parameters()):
        refuses("it has biases", "TensorRT-LLM")
    if any(isinstance(x.mlp, MLP) and x.mlp.bias for x in layers):
        refuses("it has biases in the MLP, which would be left out silently", "SGLang")
    if spec.head.kind != "causal_lm":
        refuses(f"it has the head {spec.head.kind}", "vLLM", "SGLang", "TensorRT-LLM", "llama.cpp")
    return why


READERS = ("vLLM", "SGLang", "TensorRT-LLM", "llama.cpp")


def readers(spec: ModelSpec, family: str) -> dict[str, str]:
    """What each of READERS makes of the export of this model: "yes", or what is in the way.

    Those of classes other than DeciLMForCausalLM are said of their releases since September 2024,
    before which llama.cpp took head_dim for hidden_size / num_attention_heads."""
    if family == "llama_nemotron":
        why = {reader: "; ".join(reasons) for reader, reasons in refusals(spec).items()}
        return {reader: f"no: {why[reader]}" if reader in why else "yes" for reader in READERS}
    if family not in ("llama", "mistral", "nemotron"):
        return dict.fromkeys(READERS, f"not known: their classes for {family} were not looked at")
    if spec.head.kind != "causal_lm":
        return dict.fromkeys(READERS, f"not known: it has the head {spec.head.kind}")
    found = dict.fromkeys(READERS, "yes")
    attentions = [x.attention for x in spec.layers if isinstance(x.attention, Attention)]
    if any(a.head_dim * a.num_attention_heads != spec.hidden_size for a in attentions):
        found["llama.cpp"] = "since September 2024: head_dim is not hidden_size / heads"
    if family == "nemotron":
        found["SGLang"] = "not known: its class was not looked at"
    return found
