"""A whole step of DPO is that of TRL's DPOTrainer, on the same model and data: token ids, loss,
metrics and gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

from bevatron.align.preference_rows import PreferenceRows
from bevatron.bridge.open_weights import open_weights
from bevatron.data.chat_examples import ChatExamples
from bevatron.families import by_name
from bevatron.parallel.layout import Layout
from bevatron.parallel.placed_weights import stream
from bevatron.parallel.process_groups import mesh
from bevatron.train.trainer import Trainer
from tests.align.preference_data import chat_tokenizer, pairs
from tests.processes import Pool
from tests.train.tiny_run import configuration, prepare

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
N, T = 6, 48
ROWS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in pairs()[:N]
]
TEXTS = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pairs()[:N]]
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"name": "dpo"},
    "robust": {"name": "dpo", "label_smoothing": 0.1, "robust": True},
    "sigmoid_norm": {"name": "dpo", "preference_avg_log_probs": True},
    "ipo": {"name": "ipo"},
    "hinge": {"name": "hinge"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a policy and another reference, as transformers saves them."""
    folder = prepare(tmp_path_factory.mktemp("step") / "run")
    chat_tokenizer(folder / "tokenizer")
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.08,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
    return folder


def their_trainer(folder: Path, rows: list[dict[str, Any]], loss: str) -> Any:
    from trl import DPOConfig, DPOTrainer

    def model(name: str) -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(folder / name)

    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=N,
        max_length=T,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        loss_type=[loss],
        label_smoothing=0.1 if loss == "robust" else 0.0,
        dataloader_pin_memory=False,
    )
    return DPOTrainer(
        model("policy"),
        model("reference"),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"),
    )


def batch_of(trainer: Any) -> dict[str, Tensor]:
    """Their collated batch, in the order of the rows, padded to T."""
    found = trainer.data_collator([trainer.train_dataset[i] for i in range(N)])
    more = T - found["input_ids"].shape[1]
    pad = torch.nn.functional.pad
    return {name: pad(x, (0, more)) if x.ndim == 2 else x for name, x in found.items()}


def our_step(folder: Path, keys: dict[str, Any], batch: dict[str, Tensor], size: int) -> Any:
    """Loss, norm, metrics, and the gradient by native names."""
    config = configuration(
        model={"init": str(folder / "policy")},
        objective=keys | {"reference": str(folder / "reference")},
        data={"train": [{"path": "none"}], "seq_len": T},
        train={"steps": 1, "global_batch": N, "micro_batch": size, "precision": "fp32"},
    )
    opened = open_weights(folder / "policy")
    cpu = torch.device("cpu")
    trainer = Trainer(
        opened.spec,
        Layout(),
        mesh(Layout(), cpu),
        config.objective.make(opened.spec, config),
        seq_len=T,
        train=config.train,
        optimizer=config.optimizer,
        device=cpu,
    )
    stream(trainer.placed, opened)
    trainer.fill_companions()
    samples = {
        "tokens": batch["input_ids"].view(2, N, T).transpose(0, 1),
        "learned": batch["completion_mask"].bool().view(2, N, T).transpose(0, 1),
    }
    gradient: dict[str, Tensor] = {}

    def keep(loss: float, norm: float) -> bool:
        for name, parameter in trainer.placed.parameters.items():
            whole = parameter.grad
            assert whole is not None
            gradient[name] = (whole.full_tensor() if isinstance(whole, DTensor) else whole).clone()
        return False

    loss, norm = trainer.step(samples, 0.0, keep) or (0.0, 0.0)
    return loss, norm, trainer.reported, gradient


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_metrics_and_gradient_are_theirs(folder: Path, pool: Pool, loss: str) -> None:
    theirs = their_trainer(folder, ROWS, loss)
    batch = batch_of(theirs)
    theirs.model.train()
    wanted = theirs.compute_loss(theirs.model, batch)
    wanted.backward()
    metrics = {name: values[-1] for name, values in theirs._metrics["train"].items()}
    ((found, norm, reported, gradient),) = pool.run(1, our_step, folder, LOSSES[loss], batch, 2)
    assert found == pytest.approx(wanted.item(), rel=1e-6)
    names = [name for name in reported if name in metrics]
    assert set(names) > {"rewards/chosen", "rewards/accuracies", "logps/rejected"}
    assert {n: reported[n] for n in names} == pytest.approx(
        {n: metrics[n] for n in names}, rel=1e-5, abs=1e-6
    )
    squared = 0.0
    parameters = dict(theirs.model.named_parameters())
    for entry in by_name("llama").weight_map(open_weights(folder / "policy").spec):
        ours = gradient[entry.native.name]
        ours = ours.reshape(-1, ours.shape[-1]) if ours.ndim > 1 else ours
        for i, source in enumerate(entry.sources):
            rows = [r for r in entry.rows if r.source == i]
            part = torch.cat([ours[r.native_start : r.native_start + r.count] for r in rows])
            grad = parameters[source.name].grad
            torch.testing.assert_close(part.reshape(grad.shape), grad, rtol=2e-4, atol=2e-6)
            squared += float(grad.square().sum())
    assert norm == pytest.approx(squared**0.5, rel=1e-5)


@pytest.mark.parametrize("rows", [TEXTS, ROWS], ids=["texts", "messages"])
def test_token_ids_are_theirs(folder: Path, rows: list[dict[str, Any]]) -> None:
    """And so is what is learned, but for the newline behind the end of a turn, which the model is
    never asked for: TRL learns it."""
    theirs = batch_of(their_trainer(folder, rows, "sigmoid"))
    ours = PreferenceRows(ChatExamples.open(folder / "tokenizer"), T)
    newline = 1 if "role" in str(rows[0]) else 0
    for number, row in enumerate(rows):
        arrays = ours.encode([row])[0][0]
        for i, at in enumerate((number, N + number)):
            length = int(theirs["attention_mask"][at].sum())
            assert (
                arrays["tokens"][i][:length].tolist() == theirs["input_ids"][at][:length].tolist()
            )
            learned = theirs["completion_mask"][at].bool()
            learned[length - newline :] = False
            assert arrays["learned"][i].tolist() == learned.tolist()
