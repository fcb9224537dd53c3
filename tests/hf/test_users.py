"""What users of transformers type works on an export, with the answers of the native checkpoint:
the snippets of the NanoChat and Nemotron pages, `transformers chat` and `transformers serve`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.chat.chat_template import ChatTemplate
from bevatron.generate.engine import Engine
from bevatron.generate.request import Generation, Request
from tests.bridge.hf_folders import MAKERS
from tests.hf.test_hf import BLOCKS, add_tokenizer, save
from tests.server.served import make_model, served

QUESTION = {"nanochat": "The quick brown fox", "nemotron": "The lazy dog", "decilm": "w7 w8"}
TRANSFORMERS = str(Path(sys.executable).with_name("transformers"))

# As on the pages but for the model, the number of tokens, and device=0 where there is none
PIPELINE = """
    import torch
    from transformers import pipeline

    chatbot = pipeline(task="text-generation", model=MODEL, dtype=torch.float32)
    conversation = [{"role": "user", "content": QUESTION}]
    outputs = chatbot(conversation, max_new_tokens=12)
    print(outputs[0]["generated_text"][-1]["content"])
"""
AUTO_MODEL = """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto")
    conversation = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    with torch.no_grad():
        outputs = model.generate(**inputs, max_new_tokens=12)
    generated_tokens = outputs[0, inputs["input_ids"].shape[1] :]
    print(tokenizer.decode(generated_tokens, skip_special_tokens=True))
"""
NEMOTRON = """
    import torch
    from transformers import AutoTokenizer, AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto")
    inputs = tokenizer.encode(QUESTION, return_tensors="pt").to(model.device)
    outputs = model.generate(inputs, max_length=20)
    print(tokenizer.decode(outputs[0]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`native/FAMILY`, and what was exported from each to `hf/FAMILY`."""
    folder = tmp_path_factory.mktemp("users")
    tiny = make_model(folder / "tiny")
    vocab = json.loads((tiny / "config.json").read_text())["vocab_size"]
    for family in QUESTION:
        source = folder / "source" / family
        source.mkdir(parents=True)
        if family == "decilm":
            save(source, BLOCKS)
            add_tokenizer(source)
        else:
            names = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
            MAKERS[family](**names, initializer_range=0.3).save_pretrained(source)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(tiny / name, source / name)
        # Pipelines sample if nothing is said; the likeliest of one token is a greedy answer
        sampling = {"do_sample": True, "top_k": 1, "eos_token_id": 1}
        (source / "generation_config.json").write_text(json.dumps(sampling))
        import_checkpoint(source, folder / "native" / family)
        export_checkpoint(folder / "native" / family, folder / "hf" / family, dtype="fp32")
    return folder


def answer(native: Path, question: str, tokens: int = 12) -> Generation:
    """Ours, in a chat."""
    with Engine.open(native) as engine:
        template = ChatTemplate.needed(engine.opened, engine.tokenizer)
        prompt = template.encode([{"role": "user", "content": question}])
        return engine.complete([Request(tuple(prompt), tokens, stop_tokens=engine.stop_tokens)])[0]


def snippet(text: str, models: Path, family: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What it prints."""
    capsys.readouterr()
    names = {"MODEL": str(models / "hf" / family), "QUESTION": QUESTION[family]}
    exec(textwrap.dedent(text), names)
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.parametrize("text", [PIPELINE, AUTO_MODEL], ids=["pipeline", "automodel"])
@pytest.mark.parametrize("family", QUESTION)
def test_chats_with_an_export_have_the_answers_of_the_native_checkpoint(
    models: Path, family: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import bevatron.hf  # noqa: F401  (of which only Llama-Nemotron has need)

    expected = answer(models / "native" / family, QUESTION[family]).text
    assert expected
    # Words of a decoder that joins them by spaces begin with one only behind others
    assert snippet(text, models, family, capsys).strip(" ") == expected.strip(" ")


def test_the_quickstart_of_nemotron_completes_text(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = snippet(NEMOTRON, models, "nemotron", capsys)
    with Engine.open(models / "native" / "nemotron") as engine:
        prompt = engine.tokenizer.encode(QUESTION["nemotron"]).ids
        request = Request(tuple(prompt), 20 - len(prompt), stop_tokens=engine.stop_tokens)
        tokens = engine.complete([request])[0].tokens
        assert said == engine.tokenizer.decode(prompt + tokens, skip_special_tokens=False)


def test_a_chat_piped_into_generate_is_answered_as_by_a_pipeline(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = json.dumps({"role": "user", "content": QUESTION["nanochat"]})
    line = [sys.executable, "-m", "bevatron", "generate", str(models / "native" / "nanochat")]
    done = subprocess.run(
        [*line, "--max-new-tokens", "12", "--temperature", "0"],
        input=message,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.removesuffix("\n") == snippet(PIPELINE, models, "nanochat", capsys)


def chat(folder: Path, model: str, url: str, question: str, expected: Generation) -> str:
    """What `transformers chat` was told, from the conversation that it saves."""
    lines = [question, *(["n"] if expected.finish_reason == "length" else []), "!save", "!exit"]
    line = [TRANSFORMERS, "chat", model, url, "max_new_tokens=12", "do_sample=False"]
    # Its client refuses even this machine where the Hub is switched off
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [*line, "--save-folder", str(folder), "--user", "me"],
        input="".join(f"{text}\n" for text in lines),
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [saved] = folder.rglob("chat_*.json")
    messages = json.loads(saved.read_text())["chat_history"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    return str(messages[-1]["content"])


def test_transformers_chat_talks_to_our_server(models: Path, tmp_path: Path) -> None:
    native = models / "native" / "decilm"
    expected = answer(native, QUESTION["decilm"])
    with served(native) as server:
        assert chat(tmp_path, server.model, server.url, QUESTION["decilm"], expected) == (
            expected.text
        )


@contextmanager
def transformers_serve(folder: Path, *command: str) -> Iterator[str]:
    """Its URL, until the end."""
    line = [*command, "serve", str(folder), "--device", "cpu", "--dtype", "float32"]
    log = folder.parent / f"{folder.name}.log"
    with log.open("w") as out:
        process = subprocess.Popen([*line, "--port", "0"], stdout=out, stderr=out)
        try:
            while process.poll() is None and "running on" not in log.read_text():
                time.sleep(0.1)
            found = re.search(r"http://\S+:\d+", log.read_text())
            assert found is not None, log.read_text()
            yield found[0]
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["nanochat", "decilm"])
def test_transformers_serve_and_chat_work_with_an_export(
    models: Path, tmp_path: Path, family: str
) -> None:
    """For Llama-Nemotron as `bevatron transformers serve`, which knows its classes."""
    hf = models / "hf" / family
    expected = answer(models / "native" / family, QUESTION[family])
    ours = [sys.executable, "-m", "bevatron", "transformers"]
    with transformers_serve(hf, *(ours if family == "decilm" else [TRANSFORMERS])) as url:
        # An absolute path as the name of a model is where the chat is saved. A half character at
        # the end and a space at the beginning get lost on transformers' way to stream
        said = chat(hf, str(hf), url, QUESTION[family], expected)
        assert said.strip(" \ufffd") == expected.text.strip(" \ufffd")
