"""Adapters against Hugging Face's peft: the same forward, the same training, each reads the
other's."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch.nn import functional as F

from bevatron.bridge.open_weights import open_weights
from bevatron.bridge.peft_adapter import export_adapter
from bevatron.parallel.whole_decoder import load_opened
from bevatron.train.config_file import load_config
from bevatron.train.feed import Batches
from bevatron.train.run_start import find_start
from tests.commands import bevatron
from tests.labelled_data import save_llama
from tests.processes import Pool
from tests.train.tiny_run import metrics, prepare, train

peft = pytest.importorskip("peft")
IDS = torch.arange(40).view(2, 20) * 7 % 300
CHANGES = ("model={init: hf}", "optimizer={lr: 1.0e-2, weight_decay: 0.0}", "train.steps=3")
# Of ours, and of peft's where it trains the same.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": (
        "{kind: lora, rank: 4, alpha: 8, targets: [qkv, o, gate_up, down]}",
        {"target_modules": "all-linear"},
    ),
    "dora": (
        "{kind: dora, rank: 4, alpha: 8, targets: [q, v, o, up], rslora: true}",
        {
            "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"],
            "use_dora": True,
            "use_rslora": True,
        },
    ),
    "some": (
        "{kind: lora, rank: 4, alpha: 8, targets: [k, down], layers: '1', whole: [head.*]}",
        {
            "target_modules": ["model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"],
            "modules_to_save": ["lm_head"],
        },
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("peft") / "run")
    save_llama(folder / "hf", attention_bias=True, mlp_bias=True)
    return folder


def model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)


def logits(theirs: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = theirs(input_ids=IDS).logits
    return out


def batches(folder: Path) -> list[torch.Tensor]:
    """The samples of the first steps."""

    with contextlib.chdir(folder):
        config = load_config(Path("run.yaml"), list(CHANGES))
        feed = config.objective.feed.open(
            config, find_start(config), stored=None, global_batch=4, seed=0, dp_rank=0, dp=1,
            device=torch.device("cpu"), rounded=False, batches=Batches.of(4),
        )  # fmt: skip
        return [feed.batch(step)["tokens"] for step in range(3)]


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_trains_as_peft_does_and_each_reads_the_others(
    folder: Path, pool: Pool, kind: str
) -> None:
    ours, theirs = KINDS[kind]
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **theirs)
    adapted = peft.get_peft_model(model(folder), config)
    for name, parameter in adapted.named_parameters():  # so that the start is not the base's
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder / f"{kind}-peft", save_embedding_layers=False)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    expected = []
    for tokens in batches(folder):
        out = adapted(input_ids=tokens[:, :-1]).logits
        loss = F.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((float(loss.detach()), float(norm)))
    run = f"run.dir={kind}"
    begins = f"adapter.init={kind}-peft"
    pool.run(1, train, folder, *CHANGES, f"adapter={ours}", begins, run)
    for (_, *found), wanted in zip(metrics(folder / kind), expected, strict=True):
        assert found == pytest.approx(wanted, rel=2e-5)
    export_adapter(folder / kind, folder / f"{kind}-back", show_progress=False)
    again = peft.PeftModel.from_pretrained(model(folder), folder / f"{kind}-back")
    torch.testing.assert_close(logits(again), logits(adapted), rtol=1e-5, atol=1e-5)
    decoder, _ = load_opened(open_weights(folder / kind), "cpu", torch.float32)
    torch.testing.assert_close(decoder.logits(IDS), logits(again), rtol=1e-5, atol=1e-5)
    names = [_keys(folder / f"{kind}-{end}") for end in ("peft", "back")]
    assert names[0] == names[1]


def _keys(folder: Path) -> set[str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


def test_an_a_that_q_k_and_v_share_is_written_for_each(folder: Path, pool: Pool) -> None:
    adapter = "adapter={kind: dora, rank: 3, alpha: 6, targets: [qkv, gate_up], fused: true}"
    pool.run(1, train, folder, *CHANGES, adapter, "run.dir=fused")
    status, said = bevatron(folder, "export", "fused", "fused-peft", "--to", "peft", "--json")
    assert status == 0, said
    assert json.loads(said.splitlines()[-1])["verified"]["equal"]
    again = peft.PeftModel.from_pretrained(model(folder), folder / "fused-peft")
    decoder, _ = load_opened(open_weights(folder / "fused"), "cpu", torch.float32)
    torch.testing.assert_close(decoder.logits(IDS), logits(again), rtol=1e-5, atol=1e-5)
    # And back, as the start of a run at another layout, whose first loss is that of going on.
    begins = "adapter.init=fused-peft"
    pool.run(2, train, folder, *CHANGES, adapter, begins, "run.dir=later", "parallel.tp=2")
    pool.run(1, train, folder, *CHANGES, adapter, "adapter.init=fused", "run.dir=own")
    for found, expected in zip(metrics(folder / "later"), metrics(folder / "own"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_an_adapter_of_another_kind_is_refused_in_one_line(folder: Path) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    peft.get_peft_model(model(folder), config).save_pretrained(folder / "q")
    right = "rank: 4, alpha: 8, targets: [q]"
    for adapter, says in (
        ("{rank: 8, alpha: 8, targets: [q]}", "q is of other settings; set adapter.rank=4"),
        ("{rank: 4, alpha: 8, targets: [q, k]}", "k_proj.lora_A.weight"),
        (f"{{{right}, kind: dora}}", "set adapter.kind=lora"),
    ):
        command = ["train", "run.yaml", *CHANGES, f"adapter={adapter}", "adapter.init=q"]
        status, said = bevatron(folder, *command, "run.dir=never")
        assert status == 2 and says in said and "Traceback" not in said, said
    status, said = bevatron(folder, "export", "hf", "never", "--to", "peft")
    assert status == 2 and not (folder / "never").exists(), said
