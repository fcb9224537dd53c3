"""Arguments that every configuration takes, and keeps."""

from typing import Any

config_common_kwargs: dict[str, Any] = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "architectures": ["SomeModel"],
    "id2label": {0: "yes", 1: "no", 2: "perhaps"},
    "label2id": {"yes": 0, "no": 1, "perhaps": 2},
    "problem_type": "single_label_classification",
}
