"""TRL and peft train exports, and what they save comes back: run by `make test-readers` in an
environment that has both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bevatron.bridge.convert import import_checkpoint
from bevatron.evaluate.verify import verify
from bevatron.parallel.whole_decoder import load_decoder
from tests.readers.exports import CASES, PROMPT, make

NAMES = ("llama-narrow", "nemotron", "differ-pruned")
pytestmark = pytest.mark.slow


@pytest.fixture(params=NAMES)
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make(CASES[request.param], tmp_path).folder


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def assert_comes_back(saved: Path, model: Any, before: Path) -> None:
    """Bevatron imports it, and computes what the trained model does; weights did move."""
    native = saved.parent / "again"
    import_checkpoint(saved, native, show_progress=False)
    ids = torch.tensor([PROMPT])
    decoder, _ = load_decoder(native)
    with torch.no_grad():
        ours, theirs = decoder.logits(ids), model.eval()(ids).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert verify(saved, native).ok
    assert not verify(before, native, logits=False).ok


def test_trl_fine_tunes_an_export_that_comes_back(export: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "trl", reason="TRL is missing: `make test-readers` has an environment with it"
    )
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = loaded(export)
    options = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_length=32,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    trainer = SFTTrainer(
        model=model,
        args=options,
        train_dataset=Dataset.from_dict({"text": ["def f(x): return x", "import json"] * 2}),
        processing_class=transformers.AutoTokenizer.from_pretrained(
            export, trust_remote_code=True, pad_token="</s>"
        ),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert_comes_back(tmp_path / "saved", trainer.model, export)


def test_a_lora_of_peft_merges_into_an_export_that_comes_back(export: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is missing: `make test-readers` has an environment")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(loaded(export), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        adapted = model.eval()(ids).logits
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert (merged(ids).logits - adapted).abs().max() <= 1e-4 * adapted.abs().max()
    merged.save_pretrained(tmp_path / "saved")
    assert_comes_back(tmp_path / "saved", merged, export)
