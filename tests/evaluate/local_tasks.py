"""Tasks of lm-evaluation-harness that need no network: one of each kind of request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """\
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rolling.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
UNTIL = """\
task: local_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/until.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["\\n", "e "], do_sample: false, max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}, {{metric: bleu}}]
"""
NAMES = ("local_choice", "local_rolling", "local_until")


def write_tasks(folder: Path, texts: list[str]) -> Path:
    """Questions, choices of several lengths, and texts longer than the context."""
    folder.mkdir()
    words = [t.split() for t in texts]
    choices = [
        {
            "question": " ".join(w[:9]),
            "choices": [" " + " ".join(w[9 : 9 + n]) for n in (1, 2, 4)],
            "answer": i % 3,
        }
        for i, w in enumerate(words)
    ]
    until = [{"question": t[:24], "target": t[24:40]} for t in texts]
    rows: dict[str, list[dict[str, Any]]] = {
        "choice": choices,
        "rolling": [{"text": t} for t in texts[:4]],
        "until": until,
    }
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    for name, text in zip(NAMES, (CHOICE, ROLLING, UNTIL), strict=True):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder
