"""The README.md of an export whose source had none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bevatron.spec.model import ModelSpec


def model_card(spec: ModelSpec, facts: Mapping[str, Any]) -> str:
    """A model card from the spec and the contents of bevatron.json."""
    source = facts["source"] or "random weights"
    base = f"\nbase_model: {source}" if _is_hub_id(facts["source"]) else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- bevatron{base}
---

# {facts["family"]}, {facts["parameters"] / 1e6:,.1f}M parameters

Written by Bevatron {facts["bevatron"]} at step {facts["step"]}, \
starting from {source}.

| | |
|---|---|
| layers | {len(spec.layers)} |
| hidden size | {spec.hidden_size} |
| vocabulary | {spec.vocab_size} |
| context | {spec.max_position_embeddings} |
| parameters | {facts["parameters"]:,} |
| dtype | {facts["dtype"]} |

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
```
"""


def _is_hub_id(source: str | None) -> bool:
    return source is not None and source.count("/") == 1 and not source.startswith((".", "/", "~"))
