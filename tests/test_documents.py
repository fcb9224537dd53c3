"""Every block of README.md and docs/ runs as it stands, in order, in one folder for each page.

What a page names (`native`, `tokens`, `runs/my-run`, Hub ids) is there as a tiny model or a few
tokens of ours. A command runs in this process; sizes and lengths are replaced by small ones, and a
run that would start processes is planned for as many and then trained by one. Before a block may
stand
    <!-- file: NAME... -->      it is written to these files before the page's commands run
    <!-- not run: REASON -->    such as a network, several processes, an excerpt
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from bevatron.cli.main import app
from bevatron.errors import BevatronError
from bevatron.train.config_file import checked, parse

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
# Pages, commands and programs that other tests run, or that need what is not here.
ELSEWHERE = {
    "autobridge.md": "tests/bridge/test_auto_bridge.py runs it, twice and under torchrun",
    "serve.md": "tests/server/test_docs.py runs it against a server",
    "nanochat.md": "tests/align/test_nanochat_line.py runs it",
    "bevatron serve": "tests/server",
    "bevatron transformers": "tests/hf/test_users.py",
    "bevatron doctor": "starts processes: tests/train/test_doctor.py",
    "bevatron eval --tasks": "tests/evaluate/test_tasks.py",
    "bevatron train llama3.1-minitron-4b-width data.train.0.path=my-tokens": "tests/recipes",
    "make": "what you are running",
    "pip": "a network",
    "curl": "tests/server/test_docs.py",
    "torchrun": "tests/train",
}
HF, NATIVE, RUN, STORE, HELD_OUT = "hf", "native", "run", "tokens", "held-out"
TEXT, SCORES, NANOTRON, CHAT = "text", "scores.safetensors", "nanotron", "chat"
LENGTHS = {"sft.md": "data.seq_len=256"}  # of pages whose examples are longer than 16 tokens
TURNS = """\
{% for m in messages %}{{ '<s>' + m.role + '\\n' + m.content + '</s>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"""
# What a page's commands name and do not make.
NAMES: dict[str, dict[str, str]] = {
    "README.md": {"meta-llama/Llama-3.2-1B": HF, "corpus": TEXT, "held-out": HELD_OUT},
    "training.md": {"native": NATIVE, "corpus": TEXT},
    "conversion.md": {"meta-llama/Llama-3.1-8B": HF, "folder": HF, "runs/my-run": RUN},
    "evaluate.md": {"run": RUN, "held-out": HELD_OUT},
    "sft.md": {"meta-llama/Llama-3.2-1B-Instruct": CHAT},
    "finetune-heads.md": {"meta-llama/Llama-3.2-1B": HF},
    "preferences.md": {"meta-llama/Llama-3.2-1B": HF},
    "generate.md": {"toy": NATIVE},
    "chat.md": {"toy": NATIVE},
    "minitron.md": {"MODEL": NATIVE, "CKPT": NATIVE, "text": TEXT, "TOKENS": STORE,
                    "SCORES.safetensors": SCORES},
    "search.md": {"CKPT": NATIVE, "tokens": STORE, "held-out": HELD_OUT},
    "nanotron.md": {"checkpoints": NANOTRON},
    "distillation.md": {"TEACHER": NATIVE, "native": NATIVE, "pruned": NATIVE, "teacher": NATIVE,
                        "tokens": STORE, "held-out": HELD_OUT},
    "adapters.md": {"native": NATIVE, "tokens": STORE},
    "recipes.md": {}, "reinforcement.md": {"native": NATIVE},
    "reward-models.md": {"native": NATIVE},
    "scale.md": {"tokens": STORE},
    "long-sequences.md": {}, "layouts.md": {}, "data.md": {}, "optimization.md": {},
    "cluster.md": {}, "checkpoint-format.md": {"native": NATIVE, "runs/my-run": RUN},
}  # fmt: skip
BASE = """\
model: {init: native}
data: {train: [{path: tokens}], seq_len: 16}
train: {steps: 2, global_batch: 64}
optimizer: {lr: 1.0e-4}
run: {dir: runs/my-run}
"""
DISTILL = BASE.replace("runs/my-run", "runs/student")
STORED = DISTILL + "objective: {name: distill, logits: stored, top_k: 8}\n"
# Files that a page names and does not show.
FILES = {
    "README.md": {"distill.yaml": STORED},
    "training.md": {"run.yaml": BASE, "data.jsonl": '{"text": "a film"}\n'},
    "distillation.md": {
        "run.yaml": STORED,
        "correct.yaml": BASE.replace("native", "teacher").replace("my-run", "corrected"),
    },
}  # fmt: skip
NUMBERS = {
    "3072": "24",
    "9216": "64",
    "8192": "64",
    "4.5B": "316k",
    "4000": "2",
    "29,30,32": "30,32",
    "65536": "270",
}
TRAINING = "train.steps=2 train.global_batch=2 train.micro_batch=1 data.seq_len=16 parallel.tp=1"
TRAINING += " train.precision=fp32 parallel.pp=1 schedule.warmup_steps=1 train.val_batches=1"
MORE = {
    "importance": "--samples 4 --seq-len 16",
    "prune": "--samples 2",
    "search": "--samples 4 --seq-len 16 --val-samples 4 --steps 1 --short 1 --long 1 --multiple 8"
    " --max-candidates 2 --within 40% --dtype fp32 train.global_batch=2 train.micro_batch=1",
    "logits": TRAINING,
    "chat": "--max-new-tokens 4",
    "generate": "--max-new-tokens 4",
    "eval": "--limit 64",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, line, and what the comment before it says."""

    language: str
    text: str
    line: int
    file: str | None
    not_run: str | None

    def lines(self) -> list[str]:
        """Its commands, without what they print."""
        joined = self.text.replace("\\\n", " ").splitlines()
        prompted = any(line.startswith("$ ") for line in joined)
        found = [
            line.removeprefix("$ ") for line in joined if line.startswith("$ ") or not prompted
        ]
        return [
            line
            for line in found
            if re.match(r"(\w+=\S+ )?(bevatron|echo|pip|make|curl|torchrun|python) ", line)
        ]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    pattern = r"(?:^<!-- (file|not run): (.*?) -->\n+)?^```(\w*)\n(.*?)^```"
    return [
        Block(m[3], m[4], text[: m.start(3)].count("\n") + 1,
              m[2] if m[1] == "file" else None, m[2] if m[1] == "not run" else None)
        for m in re.finditer(pattern, text, re.M | re.S)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 32 tiny layers with a tokenizer and a chat template, and what is made of it."""
    folder = tmp_path_factory.mktemp("documents")
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=96, num_hidden_layers=32,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / HF)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {c: i + 3 for i, c in enumerate(alphabet)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / HF / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
    }
    (folder / HF / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": template})
    )
    shutil.copytree(folder / HF, folder / CHAT)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / CHAT / "tokenizer.json"))
    (folder / CHAT / "chat_template.jinja").write_text(TURNS)
    (folder / TEXT).mkdir()
    (folder / TEXT / "a.txt").write_text(Path(json.__file__).read_text()[:6000])
    (folder / "other.txt").write_text(Path(json.__file__).read_text()[6000:12000])
    with contextlib.chdir(folder):
        Path("run.yaml").write_text(BASE.replace("runs/my-run", RUN))
        for command in (
            f"import {HF} {NATIVE}",
            f"tokenize {TEXT} {STORE} --tokenizer {HF} --workers 1",
            f"tokenize other.txt {HELD_OUT} --tokenizer {HF} --workers 1",
            f"importance {NATIVE} {SCORES} --data {STORE} {MORE['importance']}",
            f"export {NATIVE} {NANOTRON} --to nanotron",
            f"train run.yaml {TRAINING} train.steps=1",
        ):
            call(command.split())
    return folder


def call(words: list[str], stdin: str = "") -> str:
    """What the program says on stdout."""
    out, before = io.TextIOWrapper(io.BytesIO(), "utf-8"), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
    try:
        with contextlib.redirect_stdout(out):
            app(words, standalone_mode=False)
    finally:
        sys.stdin = before
    out.flush()
    return out.buffer.getvalue().decode()  # type: ignore[attr-defined]


def without_processes(words: list[str]) -> list[str]:
    """The same for one process."""
    out, skip = [], False
    for word in words:
        if word in ("--nproc", "--tp", "--pp"):
            skip = True
        elif not skip and not word.startswith("parallel."):
            out.append(word)
        else:
            skip = False
    return out


def small(words: list[str]) -> list[str]:
    """The same for the tiny model, in one process."""
    words = [NUMBERS.get(word, word) for word in without_processes(words)]
    return [*words, *MORE.get(words[0], "").split()]


def run(command: str, page: str, said: str) -> None:
    """`said`: what the page shows below it."""
    piped = re.fullmatch(r"echo '(.*)' \| (bevatron .*)", command)
    stdin, command = (piped[1], piped[2]) if piped else ("", command)
    if "[--" in command:
        return  # a synopsis
    words = shlex.split(command, comments=True)
    if any(set(known.split()) <= set(words) for known in ELSEWHERE):
        return
    assert words[0] == "bevatron", f"{page}: nobody runs `{command}`; mark it, or add it here"
    words = words[1:]
    if words[0] == "chat":
        stdin = "".join(re.findall(r"^>>> (.*\n)", said, re.M))
    if said.startswith("error: "):
        with pytest.raises(BevatronError) as caught:
            call(words)
        assert said.strip() == f"error: {caught.value}".strip()
        return
    if words[0] == "train" and "--dry-run" not in words and "--print-config" not in words:
        if "--nproc" in words:
            call([*words, "--dry-run"])
        more = TRAINING.split() + LENGTHS.get(page, "").split()
        call([*without_processes(words), *more])
        return
    planned = words[0] in ("train", "import", "export") and "--dry-run" in words
    call(words if planned else small(words), stdin)


def check_yaml(text: str) -> None:
    """A whole configuration, or a part of one."""
    raw: dict[str, Any] = parse(BASE, "here")
    for name, section in parse(text, "the page").items():
        known = raw.get(name)
        raw[name] = {**known, **section} if isinstance(known, dict) and name != "model" else section
    checked(raw, [], "the page")


SLOW = ("scale.md", "search.md")  # 16,384 ranks on paper; README.md has a search too
BLOCKS = {name: blocks(path) for name, path in PAGES.items() if blocks(path)}


@pytest.mark.parametrize(
    "page",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in BLOCKS],
)
def test_every_block_of_a_page_runs(
    page: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page in ELSEWHERE:
        pytest.skip(ELSEWHERE[page])
    monkeypatch.chdir(tmp_path)
    for name, kind in NAMES.get(page, {}).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(made / kind)
    for name, text in FILES.get(page, {}).items():
        Path(name).write_text(text)
    if "more.parquet" in PAGES[page].read_text():
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": ["a film", "two"]}), "more.parquet")
    for block in BLOCKS[page]:
        for name in (block.file or "").split():
            text = block.text
            for large, little in NUMBERS.items():
                text = text.replace(large, little)
            Path(name).write_text(text)
    for block in BLOCKS[page]:
        if block.not_run is not None:
            continue
        try:
            run_block(block, page)
        except Exception as error:
            error.add_note(f"{page}, line {block.line}:\n{block.text}")
            raise


def run_block(block: Block, page: str) -> None:
    if block.language == "python":
        exec(compile(block.text, page, "exec"), {"__name__": "page"})
    elif block.language == "json":
        lines = block.text.splitlines() if "}\n{" in block.text else [block.text]
        assert all(json.loads(line) for line in lines)
    elif block.language == "yaml":
        check_yaml(block.text)
    else:
        for line in block.lines():
            after = block.text.partition(f"$ {line}\n")[2]
            run(line, page, after)
