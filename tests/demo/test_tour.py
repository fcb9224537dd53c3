"""The demo's own parts; the whole tour is `make demo`."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from bevatron.demo import materials
from bevatron.demo.tour import demo
from bevatron.errors import BevatronError


def test_a_folder_that_the_demo_did_not_make_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(BevatronError, match="name another"):
            demo(None, tmp_path, steps=5, overwrite=overwrite)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_the_model_is_a_real_hugging_face_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(materials, "TEXT_BYTES", 600_000)
    assert materials.copy_text(tmp_path / "text") > 100_000
    materials.make_model(tmp_path / "text", tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "import os\nprint(os.sep)"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.startswith("<|begin_of_text|><|start_header_id|>user")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.generation_config.eos_token_id == [1, 4]
