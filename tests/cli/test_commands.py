"""The promises of every command: statuses, one message on stderr, one JSON object on stdout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bevatron import __version__
from bevatron.cli import main as cli
from bevatron.errors import CheckFailed

VERBS = ["import", "export", "verify", "inspect", "tokenize", "train", "generate", "chat", "demo"]
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def bevatron(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bevatron", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_package_and_its_help_import_nothing_heavy() -> None:
    code = (
        "import sys, bevatron, bevatron.cli.main\n"
        "heavy = {'torch', 'numpy', 'transformers', 'huggingface_hub', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_verb_and_version_is_the_package_s() -> None:
    shown = bevatron("--help")
    assert shown.returncode == 0
    assert all(f" {verb} " in shown.stdout for verb in VERBS)
    assert bevatron("--version").stdout == f"bevatron {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["frobnicate"], "frobnicate"),
        (["--frobnicate"], "--frobnicate"),
        (["inspect"], "Missing argument"),
        (["inspect", "nowhere/at/all"], "nowhere/at/all"),
        (["import", "a", "b", "--from", "megatron"], "--from megatron: not supported yet"),
        (["import", "a", "b", "--from", "nanotron"], "a: does not exist"),
        (["export", "a", "b", "--to", "megatron"], "--to megatron: not supported yet"),
        (["export", "a", "b", "--to", "nanotron"], "a: does not exist"),
        (["export", "nowhere", "b"], "nowhere"),
        (["verify", "nowhere/a", "nowhere/b", "--no-logits"], "nowhere"),
        (["tokenize", "a", "--tokenizer", "t"], "SRC... DST"),
        (["train"], "--print-config"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "nowhere.yaml", "--nproc", "0"], "--nproc"),
        (["generate", "x"], "--prompt"),
        (["generate", "x", "--prompt", "a", "--tp", "0"], "--tp"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_status_2_and_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = bevatron(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_json_is_one_object_with_the_promised_keys(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    done = bevatron("inspect", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert {"family", "parameters", "layers", "bytes", "dtype", "step"} <= set(shown)
    assert (shown["family"], shown["layers"], shown["step"]) == ("llama", 2, None)


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (CheckFailed("they differ"), 1, "error: they differ\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (FileNotFoundError(2, "No such file", "/a/b"), 2, "error: /a/b: No such file\n"),
        (PermissionError(13, "Permission denied", "/c"), 2, "error: /c: Permission denied\n"),
        (
            ZeroDivisionError("by zero\nand more"),
            70,
            "error: unexpected ZeroDivisionError at test_commands.py:LINE: by zero "
            "(set BEVATRON_TRACEBACK=1 to see where it came from)\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_a_verb_raises_is_one_message(
    error: BaseException,
    status: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("bevatron.bridge.inspect.inspect", fails)
    monkeypatch.setattr(sys, "argv", ["bevatron", "inspect", "x"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == status
    assert re.sub(r":\d+:", ":LINE:", capsys.readouterr().err) == says
    monkeypatch.setenv("BEVATRON_TRACEBACK", "1")
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err
    assert left.value.code == status
    assert ("Traceback (most recent call last):" in said) == (status == 70)


@pytest.mark.parametrize("arguments", [[], ["launch"]])
def test_a_group_of_verbs_alone_shows_its_help(arguments: list[str]) -> None:
    alone, asked = bevatron(*arguments), bevatron(*arguments, "--help")
    assert (alone.returncode, alone.stderr) == (0, "")
    assert alone.stdout == asked.stdout != ""


def test_the_help_groups_the_verbs_and_says_whole_sentences() -> None:
    shown = bevatron("--help").stdout
    assert "..." not in shown.replace("[ARGS]...", "")
    parts = re.split(r"^(\S.*):$", shown, flags=re.M)
    groups = dict(zip(parts[1::2], parts[2::2], strict=True))
    for group, verb in {
        "Convert": "export",
        "Train": "tokenize",
        "Compress": "search",
        "Generate and evaluate": "serve",
        "Machines and clusters": "doctor",
        "More": "demo",
    }.items():
        assert f"\n  {verb} " in groups[group]
    for name, body in groups.items():
        if name != "Options":  # what says it is one, or the first sentence of one
            assert body.rstrip().endswith("."), name


def test_the_shell_completes_verbs_and_options() -> None:
    def completed(words: str) -> str:
        asked = {"_BEVATRON_COMPLETE": "complete_bash", "COMP_WORDS": words}
        asked["COMP_CWORD"] = str(words.count(" "))
        code = "import sys; sys.argv = ['bevatron']; from bevatron.cli.main import main; main()"
        env = {**os.environ, **asked}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
        )
        return done.stdout

    assert completed("bevatron pru").split() == ["prune"]
    assert "--drop-layers" in completed("bevatron prune --dr").split()
