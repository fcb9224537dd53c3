"""A batch of TRL's SFTTrainer is ours: token ids, labels, loss and gradient norm, on the same model
and data, also at tp 2 and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

from bevatron.align.chat_rows import ChatRows
from bevatron.align.sft_feed import Conversations
from bevatron.data.chat_examples import ChatExamples
from bevatron.train.config import SourceConfig
from tests.align.sft_data import chats, lines, prepared, run
from tests.labelled_data import write_rows
from tests.processes import Pool

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
T = 64
# As `sft_data.TEMPLATE`, with the mark that TRL needs.
MARKED = (
    "{% for m in messages %}{{ '<s>' + m.role[0] + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '</s>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>a\n' }}{% endif %}"
)
TURNS = [row for row in chats() if "messages" in row][:8]
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": TURNS,
    "messages-whole": TURNS,
    "conversational-completions": [
        {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in TURNS
    ],
    "completions": [row for row in chats() if "prompt" in row][:8],
    "texts": [row for row in chats(80) if "text" in row][:8],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a model and its tokenizer, as transformers saves them."""
    folder = prepared(tmp_path_factory.mktemp("step") / "run")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    for file in (folder / "tokenizer").iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    (folder / "marked.jinja").write_text(MARKED)
    for name, rows in ROWS.items():
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def theirs(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, float]]:
    """TRL's batch of all rows, its loss and the norm of its gradient."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(ROWS[name]),
        max_length=T,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        assistant_only_loss=name == "messages",
        dataloader_pin_memory=False,
        chat_template_path=str(folder / "marked.jinja"),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
    trainer = SFTTrainer(
        transformers.LlamaForCausalLM.from_pretrained(folder / "model"),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(ROWS[name]),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    squared = sum(float(p.grad.square().sum()) for p in trainer.model.parameters())
    return batch, {"loss": float(loss.detach()), "grad_norm": squared**0.5}


@pytest.mark.parametrize("name", ROWS)
def test_the_batch_and_the_loss_are_trls(folder: Path, pool: Pool, name: str) -> None:
    batch, want = theirs(folder, name)
    whole = name == "messages-whole"
    rows = ChatRows(ChatExamples.open(folder / "tokenizer", assistant_only=not whole), T)
    ours = Conversations([SourceConfig(path=str(folder / f"{name}.jsonl"))], rows)
    made = []
    for sample in ours[range(len(ours))]:
        labels = [
            int(id) if learned else -100
            for id, learned in zip(sample["tokens"], sample["learned"], strict=True)
        ]
        made.append((sample["tokens"].tolist(), labels))
    found = []
    for ids, mask, labels in zip(
        batch["input_ids"].tolist(),
        batch["attention_mask"].tolist(),
        batch["labels"].tolist(),
        strict=True,
    ):
        length = sum(mask)
        padding, first = T - length, -100  # what nothing comes before is no label in either
        pad = [rows.pad_id] * padding
        found.append((ids[:length] + pad, [first, *labels[1:length]] + [-100] * padding))
    assert sorted(made) == sorted(found)
    objective = f"objective={{name: sft, assistant_only_loss: {'false' if whole else 'true'}}}"
    data = (f"data.train=[{{path: {name}.jsonl}}]", f"data.seq_len={T}", "data.validation=[]")
    size = ("train.steps=1", "train.val_every=0", "optimizer.clip_grad=0", "model={init: model}")
    for ranks, layout, more in (
        (1, "{}", ("train.global_batch=8", "train.micro_batch=2")),
        (2, "{tp: 2}", ("train.global_batch=8", "train.micro_batch=4")),
    ):
        place = (f"run.dir={name}-{ranks}", f"parallel={layout}")
        pool.run(ranks, run, folder, objective, *data, *size, *place, *more)
        [line] = lines(folder / f"{name}-{ranks}")
        assert line == pytest.approx({"step": 1} | want, rel=1e-6)
