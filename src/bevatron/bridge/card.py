"""The README.md of an export whose source had none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bevatron.spec.model import HeadKind, ModelSpec

# transformers' Auto class and the Hub's task of each head.
AUTO: dict[HeadKind, tuple[str, str]] = {
    "causal_lm": ("AutoModelForCausalLM", "text-generation"),
    "sequence_classification": ("AutoModelForSequenceClassification", "text-classification"),
    "token_classification": ("AutoModelForTokenClassification", "token-classification"),
    "question_answering": ("AutoModelForQuestionAnswering", "question-answering"),
    "none": ("AutoModel", "feature-extraction"),
}

_REGISTERED = """
After `import bevatron.hf` neither needs the flag.
"""


def model_card(spec: ModelSpec, facts: Mapping[str, Any]) -> str:
    """A model card from the spec and the contents of bevatron.json."""
    auto, task = AUTO[spec.head.kind]
    name = facts["source"]
    base = f"\nbase_model: {name}" if facts["revision"] and name.count("/") == 1 else ""
    revision = f" at revision `{facts['revision']}`" if facts["revision"] else ""
    source = f"`{name}`{revision}" if name else "random weights"
    remote = facts["family"] == "llama_nemotron"
    trust = ", trust_remote_code=True" if remote else ""
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags:
- bevatron{base}
---

# {facts["family"]}, {facts["parameters"] / 1e6:,.1f}M parameters

| | |
|---|---|
| layers | {len(spec.layers)} |
| hidden size | {spec.hidden_size} |
| vocabulary | {spec.vocab_size} |
| context | {spec.max_position_embeddings} |
| head | {spec.head.kind} |
| parameters | {facts["parameters"]:,} |
| dtype | {facts["dtype"]} |

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("path/to/this/folder", dtype="auto"{trust})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder"{trust})
```
{_REGISTERED if remote else ""}
## Provenance

Written by Bevatron {facts["bevatron"]} from {source}: {", ".join(facts["done"])}.

{_accounting(facts)}

`bevatron.json` holds the XXH3 hash of every tensor and the file that it is in. After writing, all
{facts["verified"]["tensors"]} tensors were read back and had these hashes. The hash over all native
weights is `{facts["weights"]}`.
"""


def _accounting(facts: Mapping[str, Any]) -> str:
    if facts["source_tensors"] is None:
        return "There was no source to account for."
    carried, skipped = facts["carried"], facts["skipped"]
    lines = [
        f"All {facts['source_tensors']} tensors of the source were accounted for; "
        f"{len(carried)} of them are no parameters and were carried along unchanged."
    ]
    if facts["accepted"]:
        lines += ["", "Fields of config.json that were said to do nothing:", ""]
        lines += [f"- `{name}`: `{value!r:.80}`" for name, value in facts["accepted"].items()]
    if skipped:
        lines += ["", "Not taken from the source:", ""]
        lines += [f"- `{file}`: {why}" for file, why in skipped.items()]
    return "\n".join(lines)
