"""docs/nanochat.md leads from text to a model that chats on a page."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.server.served import served
from tests.test_documents import PAGES, blocks, call

SHORT = {
    "base.yaml": ["train.steps=2", "train.global_batch=2", "train.micro_batch=1"],
    "sft.yaml": ["train.steps=2", "train.global_batch=2", "train.micro_batch=1"],
    "rl.yaml": ["train.steps=2", "train.global_batch=4", "train.micro_batch=2",
                "objective.num_generations=2", "data.validation=[]", "train.val_every=0"],
}  # fmt: skip


def follow(page: str, short: bool) -> dict[str, str]:
    """Every block of the page in the folder where we are, but for the server: what each verb said
    last."""
    said = {}
    for block in blocks(PAGES[page]):
        if block.not_run is not None:
            continue
        if block.language == "python":
            exec(compile(block.text, page, "exec"), {"__name__": "page"})
        if block.file is not None:
            Path(block.file).write_text(block.text)
        for line in block.lines() if block.language == "bash" else ():
            words = shlex.split(line, comments=True)[1:]
            if words[0] == "train" and short:
                words += SHORT[words[1]]
            if words[0] != "serve":
                said[words[0]] = call(words)
    return said


def steps(run: str) -> list[dict[str, Any]]:
    text = Path(run, "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_its_commands_lead_from_text_to_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    follow("nanochat.md", short=True)
    told = capsys.readouterr().err
    assert "NanoChat of depth 2: 128 channels, 1 heads, 655,360 parameters" in told
    assert "reward" in steps("runs/rl")[0]
    model = transformers.AutoModelForCausalLM.from_pretrained("hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf")
    assert type(model).__name__ == "NanoChatForCausalLM" and len(tokenizer) == 1024
    ends = tokenizer.convert_tokens_to_ids(["<|bos|>", "<|assistant_end|>"])
    assert model.generation_config.eos_token_id == ends
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|bos|><|user_start|>Hi<|user_end|>"


@pytest.mark.slow
def test_as_it_stands_it_learns_to_chat_and_answers_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = follow("nanochat.md", short=False)
    assert said["generate"].strip().startswith("#### ")
    base, sft, rl = (steps(f"runs/{name}") for name in ("base", "sft", "rl"))
    assert base[0]["loss"] > 6.5 and base[-1]["loss"] < 4.5 and sft[-1]["loss"] < 0.5
    rewards = [line["reward"] for line in rl if "reward" in line]
    assert len(rewards) == 12 and max(rewards) > 0.1, rewards
    with served(tmp_path / "runs/rl") as server:
        assert "<html" in server.get("/").text
        chat = [{"role": "user", "content": "Who are you?"}]
        answer = server.post("/v1/chat/completions", {"messages": chat, "temperature": 0}).json()
        assert answer["choices"][0]["message"]["content"]
