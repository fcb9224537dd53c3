"""A real pretrained chat model, SmolLM2-135M-Instruct as published, through all that we are for:
in, compared, talked to, trained at several layouts, pruned, and out again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from bevatron.bridge.convert import import_checkpoint
from bevatron.data.tokenize import tokenize
from bevatron.parallel.whole_decoder import load_decoder
from tests.commands import bevatron
from tests.processes import Pool
from tests.real import smollm2
from tests.server.served import served
from tests.train.tiny_run import metrics, train

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
PROMPTS = ("def fibonacci(n):\n", "In 1969, 3 men flew")
ONE_STEP = ("train.steps=1", "train.micro_batch=1")  # two micro-batches for two stages
CONFIG = """\
model: {init: native}
data: {train: [{path: tokens}], seq_len: 48}
train: {steps: 2, global_batch: 4, micro_batch: 2, precision: fp32}
optimizer: {lr: 1.0e-4}
schedule: {name: constant}
checkpoint: {keep: 1}
run: {dir: run}
"""


@pytest.fixture(scope="module")
def hf() -> Path:
    return smollm2.folder()


@pytest.fixture(scope="module")
def work(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`native`, `tokens` of real text, and `run.yaml`."""
    folder = tmp_path_factory.mktemp("smollm2")
    status, said = bevatron(folder, "import", str(hf), "native", "--json")
    assert status == 0, said
    (folder / "text.txt").write_text(Path(json.__file__).read_text())
    tokenize([folder / "text.txt"], folder / "tokens", tokenizer=hf, workers=1)
    (folder / "run.yaml").write_text(CONFIG)
    yield folder
    shutil.rmtree(folder)  # gigabytes


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def loaded(folder: Path, dtype: str = "auto") -> transformers.LlamaForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def assert_same_logits(native: Path, exported: Path, hf: Path) -> None:
    """Bevatron on the checkpoint and transformers on its export, on real text, computed in fp32."""
    text = transformers.AutoTokenizer.from_pretrained(hf)(Path(json.__file__).read_text()).input_ids
    ids = torch.tensor([text[:96]])
    decoder, _ = load_decoder(native, dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = decoder.logits(ids), loaded(exported, "float32")(ids).logits
    assert theirs.std() > 1
    assert (ours - theirs).abs().max() <= 2e-4 * theirs.abs().max()


def test_it_comes_in_as_published_is_verified_and_goes_out_byte_for_byte(
    hf: Path, work: Path
) -> None:
    status, said = bevatron(work, "verify", str(hf), "native", "--json")
    assert status == 0, said
    found = json.loads(said[said.index("{") :])
    assert found["ok"] and found["tensors"] == 272
    status, said = bevatron(work, "export", "native", "out", "--json")
    assert status == 0 and json.loads(said[said.index("{") :])["parameters"] == 134_515_008
    names = sorted(p.name for p in hf.iterdir())
    assert sorted(p.name for p in (work / "out").iterdir()) == names
    for name in names:
        assert (work / "out" / name).read_bytes() == (hf / name).read_bytes(), name


def test_greedy_tokens_are_those_of_transformers(hf: Path, work: Path, tmp_path: Path) -> None:
    import_checkpoint(hf, tmp_path / "native", dtype="fp32")
    model, tokenizer = loaded(hf, "float32"), transformers.AutoTokenizer.from_pretrained(hf)
    for prompt in PROMPTS:
        more = ("--prompt", prompt, "--max-new-tokens", "16", "--temperature", "0", "--json")
        status, said = bevatron(tmp_path, "generate", "native", *more)
        assert status == 0, said
        ids = tokenizer(prompt, return_tensors="pt")
        wanted = model.generate(**ids, max_new_tokens=16, do_sample=False)[0]
        assert json.loads(said[said.index("{") :])["tokens"] == (
            wanted[ids.input_ids.shape[1] :].tolist()
        )


def test_chat_and_server_know_the_capital_of_france(work: Path) -> None:
    chat = [sys.executable, "-m", "bevatron", "chat", "native", "--temperature", "0"]
    done = subprocess.run(
        chat,
        cwd=work,
        input=QUESTION[0]["content"] + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ANSWER in done.stdout
    with served(work / "native") as server:
        body = {"model": server.model, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
        answer = server.post("/v1/chat/completions", body).json()
    (choice,) = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER, "stop")


def test_trained_at_pp_2_x_dp_2_and_at_tp_3_as_in_one_process_and_exported_to_what_is_computed(
    hf: Path, work: Path, pool: Pool
) -> None:
    """9 query heads and 3 KV heads on 3 ranks."""
    pool.run(1, train, work, "run.dir=alone")
    shutil.rmtree(work / "alone" / "step-00000002")
    pool.run(4, train, work, "parallel={pp: 2, dp_shard: 2}", *ONE_STEP)
    pool.run(3, train, work, "parallel.tp=3")
    alone, got = metrics(work / "alone"), metrics(work / "run")
    assert [step for step, _, _ in alone] == [1, 2]
    assert all(0.5 < loss < 4 and 0 < norm < 100 for _, loss, norm in alone)
    for wanted, found in zip(alone, got, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)  # fp32: other sums in another order
    status, said = bevatron(work, "export", "run", "trained", "--json")
    assert status == 0, said
    before, after = loaded(hf).state_dict(), loaded(work / "trained").state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 200 and "model.embed_tokens.weight" in moved
    config = json.loads((hf / "config.json").read_text()) | {"torch_dtype": "float32"}
    assert json.loads((work / "trained" / "config.json").read_text()) == config
    assert_same_logits(work / "run", work / "trained", hf)


def test_it_is_pruned_in_depth_and_width_and_transformers_computes_the_rest(
    hf: Path, work: Path
) -> None:
    sizes = ("--num-layers", "24", "--depth-by", "influence", "--intermediate-size", "1024")
    measured = ("--data", "tokens", "--samples", "1")
    status, said = bevatron(work, "prune", "native", "small", *sizes, *measured)
    assert status == 0, said
    status, said = bevatron(work, "export", "small", "pruned")
    assert status == 0, said
    config = json.loads((work / "pruned" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (24, 1024)
    assert_same_logits(work / "small", work / "pruned", hf)
