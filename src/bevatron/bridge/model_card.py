"""The README.md of an export.

It is written if the source had none, and brought up to date if an earlier export wrote it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import CheckpointError
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
{_provenance(facts)}"""


# A card of ours that nobody edited, in whatever words the values are; and the part of it that would
# be wrong of any other weights.
_SECTION = re.compile(
    r"## Provenance\n\nWritten by Bevatron (?:(?!\n#).)*?The hash over all native\s+weights is "
    r"`[^`\n]*`\.\n",
    re.DOTALL,
)
_OWN = re.compile(
    r"---\nlibrary_name: transformers\npipeline_tag: [\w-]+\ntags:\n- bevatron"
    r"(?:\nbase_model: [^\n]+)?\n---\n\n# [^\n]+ parameters\n\n"
    r"\| \| \|\n\|---\|---\|\n(?:\|[^\n]*\|\n)+\n```python\nfrom transformers import "
    rf"(?:(?!```).)*```\n(?:{re.escape(_REGISTERED)})?\n{_SECTION.pattern}",
    re.DOTALL,
)


def write_record(folder: Path, spec: ModelSpec, facts: Mapping[str, Any]) -> None:
    """bevatron.json and README.md of an export whose other files lie in `folder`, the source's own
    two among them. If the source was an export of ours, they are written anew; what is somebody
    else's stays."""
    record, card = folder / "bevatron.json", folder / "README.md"
    if not record.exists() or _is_ours(record):
        record.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    old = card.read_text(encoding="utf-8", errors="surrogateescape") if card.exists() else None
    new = renewed_card(old, spec, facts)
    if new is not None:
        card.write_text(new, encoding="utf-8", errors="surrogateescape")


def renewed_card(old: str | None, spec: ModelSpec, facts: Mapping[str, Any]) -> str | None:
    """What README.md has to say now; None if it may stay as it is.

    Args:
        old: the source's, if it had one. If it is a card of ours, the new one replaces it; if
            somebody built his own around one, only what it says of the weights' origin does.
    """
    if old is None or _OWN.fullmatch(old):
        return model_card(spec, facts)
    return _SECTION.sub(lambda _: _provenance(facts), old) if _SECTION.search(old) else None


def _is_ours(record: Path) -> bool:
    try:
        return {"bevatron", "weights", "tensors", "done"} <= set(read_object(record))
    except CheckpointError:
        return False


def _provenance(facts: Mapping[str, Any]) -> str:
    name = facts["source"]
    revision = f" at revision `{facts['revision']}`" if facts["revision"] else ""
    source = f"`{name}`{revision}" if name else "random weights"
    return f"""## Provenance

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
