"""`bevatron train` as a user runs it: real processes, real folders, and out to transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.data.tokenize import tokenize
from bevatron.parallel.whole_decoder import load_decoder
from bevatron.spec import MLP, Attention, Head, LayerSpec, Linear, ModelSpec
from bevatron.spec.json import to_json
from tests.commands import ran as bevatron

CONFIG = """\
model: {init: native}
data: {train: [{path: tokens}], validation: [{path: tokens}], seq_len: 16}
train: {steps: 4, global_batch: 8, micro_batch: 2, precision: fp32, val_every: 2, val_batches: 1}
optimizer: {lr: 1.0e-3}
schedule: {name: constant}
checkpoint: {every: 2, keep: 1}
run: {dir: run}
"""


def torchrun(folder: Path, nproc: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    return subprocess.run(
        [sys.executable, "-m", *command, "-m", "bevatron", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder in bf16 with a tokenizer, its import, and tokens."""
    folder = tmp_path_factory.mktemp("train")
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "hf")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {c: i + 3 for i, c in enumerate(alphabet)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "hf" / "tokenizer.json"))
    import_checkpoint(folder / "hf", folder / "native")
    (folder / "text.txt").write_text(Path(json.__file__).read_text())
    tokenize([folder / "text.txt"], folder / "tokens", tokenizer=folder / "hf")
    (folder / "run.yaml").write_text(CONFIG)
    return folder


def lines(folder: Path, key: str = "loss") -> list[tuple[int, float]]:
    text = (folder / "metrics.jsonl").read_text()
    return [(x["step"], x[key]) for x in map(json.loads, text.splitlines()) if key in x]


def test_launch_resume_torchrun_and_export(work: Path) -> None:
    """One process to the end; the same in two launched parts at two layouts; equal to 1e-5."""
    whole = bevatron(work, "train", "run.yaml", "run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    started = bevatron(work, "train", "run.yaml", "--nproc", "2", "parallel.tp=2",
                       "train.steps=2")  # fmt: skip
    assert started.returncode == 0, started.stderr
    assert "Traceback" not in started.stderr
    resumed = torchrun(work, 2, "train", "run.yaml", "parallel.pp=2")  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    for key in ("loss", "grad_norm", "val_loss"):
        expected = lines(work / "whole", key)
        assert [s for s, _ in expected] == ([1, 2, 3, 4] if key != "val_loss" else [0, 2, 4])
        for got, want in zip(lines(work / "run", key), expected, strict=True):
            assert got == (want[0], pytest.approx(want[1], rel=1e-5)), key
    assert (work / "run" / "latest").read_text().strip() == "step-00000004"
    assert [p.name for p in sorted((work / "run").glob("step-*"))] == ["step-00000004"], "keep: 1"
    assert not list((work / "run").glob(".*partial*"))

    export_checkpoint(work / "run", work / "trained")
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "trained", dtype="auto")
    assert model.dtype == torch.float32, "the run's precision"
    original = transformers.AutoModelForCausalLM.from_pretrained(work / "hf", dtype="auto")
    assert not torch.equal(model.lm_head.weight, original.lm_head.weight.float())
    assert (work / "trained/tokenizer.json").read_bytes() == (
        work / "hf/tokenizer.json"
    ).read_bytes()


def test_bf16_started_from_the_hf_folder_exports_into_its_own_files(work: Path) -> None:
    """Weights of the same names, shapes and dtypes return in the source's config and shard."""
    ran = bevatron(work, "train", "run.yaml", "model.init=hf", "run.dir=bf16",
                   "train.precision=bf16", "train.steps=2")  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    export_checkpoint(work / "bf16", work / "bf16-out")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (work / "bf16-out" / name).read_bytes() == (work / "hf" / name).read_bytes(), name
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "bf16-out", dtype="auto")
    assert model.dtype == torch.bfloat16
    ours, theirs = (work / name / "model.safetensors" for name in ("bf16-out", "hf"))
    size = 8 + int.from_bytes(theirs.read_bytes()[:8], "little")
    assert ours.read_bytes()[:size] == theirs.read_bytes()[:size], "the source's own header"
    assert ours.read_bytes() != theirs.read_bytes()


@pytest.mark.slow
def test_an_hf_folder_trains_at_tp2_pp2_under_torchrun_without_a_conversion(work: Path) -> None:
    """The loss of one process, at four."""
    arguments = ["train", "run.yaml", "model.init=hf", "train.steps=2"]
    layout = ["parallel.tp=2", "parallel.pp=2"]
    for done in (
        bevatron(work, *arguments, "run.dir=hf-one"),
        torchrun(work, 4, *arguments, "run.dir=hf-four", *layout),
    ):
        assert done.returncode == 0, done.stderr
    one, four = lines(work / "hf-one"), lines(work / "hf-four")
    assert [step for step, _ in four] == [1, 2]
    assert [x for _, x in four] == pytest.approx([x for _, x in one], rel=1e-5)


@pytest.mark.slow
def test_random_heterogeneous_weights_train_and_export_as_llama_nemotron(work: Path) -> None:
    """No source at all: config.json is written from the spec, the tokenizer comes along."""
    layers = (
        LayerSpec(Attention(4, 1, 8), MLP(256)),
        LayerSpec(Linear(), None),
        LayerSpec(None, MLP(512)),
        LayerSpec(Attention(4, 4, 8), Linear()),
    )
    (work / "spec.json").write_text(to_json(ModelSpec(300, 32, layers)))
    (work / "random.yaml").write_text(
        CONFIG.replace("init: native", "spec: spec.json") + "tokenizer: hf\n"
    )
    ran = bevatron(work, "train", "random.yaml", "--nproc", "2", "run.dir=random")
    assert ran.returncode == 0, ran.stderr
    export_checkpoint(work / "random", work / "random-out")
    config = json.loads((work / "random-out" / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert (work / "random-out" / "tokenizer.json").is_file()
    ours, spec = load_decoder(work / "random")
    again, _ = load_decoder(work / "random-out")
    assert spec.layers == layers
    ids = torch.arange(3, 20)[None]
    assert torch.equal(ours.logits(ids), again.logits(ids))


def test_a_token_outside_of_the_vocabulary_is_refused(work: Path) -> None:
    (work / "tiny.json").write_text(to_json(ModelSpec(101, 32, (LayerSpec(None, MLP(256)),))))
    (work / "tiny.yaml").write_text(CONFIG.replace("init: native", "spec: tiny.json"))
    ran = bevatron(work, "train", "tiny.yaml", "run.dir=refused")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ") and "101" in ran.stderr


def test_a_model_without_a_causal_lm_head_is_refused(work: Path) -> None:
    head = Head("question_answering", bias=True)
    spec = ModelSpec(512, 32, (LayerSpec(None, MLP(256)),), head=head)
    (work / "answers.json").write_text(to_json(spec))
    (work / "answers.yaml").write_text(CONFIG.replace("init: native", "spec: answers.json"))
    ran = bevatron(work, "train", "answers.yaml", "run.dir=refused")
    assert ran.returncode == 2
    assert "causal_lm" in ran.stderr and "question_answering" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parallel.tp=3", "--nproc", "3"], "4 query heads, which tp=3 does not divide"),
        (["--nproc", "2", "parallel.tp=4"], "start a multiple of 4"),
        (["train.stepz=3"], "did you mean train.steps"),
        (["model.init=nowhere/at/all"], "nowhere/at/all"),
        (["data.train.0.path=missing"], "missing"),
        (["train.global_batch=7"], "global_batch"),
    ],
)
def test_bad_input_is_one_message_and_no_run_folder(
    work: Path, arguments: list[str], message: str
) -> None:
    ran = bevatron(work, "train", "run.yaml", "run.dir=refused", *arguments)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ") and message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (work / "refused").exists()


@pytest.mark.slow
def test_one_damaged_byte_stops_all_ranks_with_its_message(work: Path) -> None:
    shutil.copytree(work / "native", work / "damaged")
    path = work / "damaged" / "model" / "00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    ran = bevatron(work, "train", "run.yaml", "--nproc", "2", "model.init=damaged",
                   "run.dir=refused")  # fmt: skip
    assert ran.returncode == 2
    assert ran.stderr.count("error: ") == 1 and "damaged: their hash is" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_bug_in_a_started_process_is_one_line_and_its_own_status(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "buggy").mkdir()
    (work / "buggy" / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import bevatron.train.training_loop\n"
        "    bevatron.train.training_loop.Run.go = lambda *given: 1 / 0\n"
    )
    path = f"{work / 'buggy'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", path)
    arguments = ["train", "run.yaml", "run.dir=bug", "--nproc", "2"]
    ran = bevatron(work, *arguments)
    assert ran.returncode == 70
    line = ran.stderr.splitlines()[-1]
    assert line.startswith("error: rank 1: unexpected ZeroDivisionError at sitecustomize.py:4: div")
    assert "BEVATRON_TRACEBACK=1" in line and "Traceback" not in ran.stderr


def test_a_resumed_run_refuses_what_would_change_its_numbers(work: Path) -> None:
    for value in ("train.seed=5", "data.seq_len=8", "optimizer.lr=0.5"):
        ran = bevatron(work, "train", "run.yaml", "run.dir=whole", "train.steps=6", value)
        assert ran.returncode == 2
        assert value.partition("=")[0] in ran.stderr


def test_dry_run_starts_nothing(work: Path) -> None:
    ran = bevatron(work, "train", "run.yaml", "--dry-run", "--nproc", "8",
                   "parallel.tp=2", "parallel.pp=2", "run.dir=dry")  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "pp 2 x dp_shard 2 x tp 2" in ran.stdout
    assert not (work / "dry").exists()


def test_a_nanotron_checkpoint_trains_where_it_lies(work: Path) -> None:
    """Without an import; the run keeps the tokenizer and token ids, and goes back to Nanotron."""
    export_checkpoint(work / "native", work / "nanotron", target_format="nanotron")
    for init in ("nanotron", "native"):
        done = bevatron(work, "train", "run.yaml", "train.steps=2",
                        f"model.init={init}", f"run.dir=from-{init}")  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert lines(work / "from-nanotron") == lines(work / "from-native")
    run = work / "from-nanotron"
    assert json.loads((run / "step-00000002/source/config.json").read_text())["eos_token_id"] == 2
    export_checkpoint(run, work / "back", target_format="nanotron")
    assert (work / "back" / "latest.txt").read_text() == "2"
    assert (work / "back" / "2" / "tokenizer" / "tokenizer.json").is_file()
    metas = json.loads((work / "back" / "2" / "checkpoint_metadata.json").read_text())["metas"]
    assert (metas["last_train_step"], metas["consumed_train_samples"]) == (2, 16)
    export_checkpoint(run, work / "back-hf")
    transformers.AutoModelForCausalLM.from_pretrained(work / "back-hf")


@pytest.mark.slow
def test_documents_and_context_parallel_as_a_user_asks_for_them(work: Path) -> None:
    """A store of several documents, masked from one another: two context-parallel ranks continue
    what one process began, and validate, as it alone does."""
    for i, name in enumerate(("a", "b", "c")):
        (work / f"{name}.txt").write_text(Path(json.__file__).read_text()[i * 70 : i * 100 + 90])
    tokenize([work / f"{name}.txt" for name in "abc"] * 20, work / "packed", tokenizer=work / "hf")
    data = [
        "data.train=[{path: packed}]",
        "data.document_mask=true",
        "data.validation=[{path: packed}]",
    ]
    for run, steps, layout in (
        ("packed-one", 4, []),
        ("packed-cp", 2, []),
        ("packed-cp", 4, ["--nproc", "2", "parallel.cp=2"]),
        ("unmasked", 1, ["data.document_mask=false"]),
    ):
        ran = bevatron(work, "train", "run.yaml", f"run.dir={run}",
                       f"train.steps={steps}", *data, *layout)  # fmt: skip
        assert ran.returncode == 0, ran.stderr
    for key in ("loss", "grad_norm", "val_loss"):
        expected = lines(work / "packed-one", key)
        for got, want in zip(lines(work / "packed-cp", key), expected, strict=True):
            assert got == (want[0], pytest.approx(want[1], rel=1e-5)), key
    assert lines(work / "packed-one")[0][1] != lines(work / "unmasked")[0][1]
    refused = bevatron(work, "train", "run.yaml", "--nproc", "4", "parallel.cp=4",
                       "data.seq_len=20", *data)  # fmt: skip
    assert refused.returncode == 2
    assert "not a multiple of 8 (2 x cp 4)" in refused.stderr
