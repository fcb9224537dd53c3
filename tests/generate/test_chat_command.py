"""`bevatron generate`: texts, chats as JSON on standard input, files of prompts."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.refusal import command
from tests.generate.chat_templates import reference, tokenizer
from tests.generate.talkers import answer_of_transformers, make_talker

HI = {"role": "user", "content": "Hello there"}
DATE = "26 Jul 2024"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talker(tmp_path_factory.mktemp("talker") / "hf", "llama3")


@pytest.fixture
def run(talker: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*arguments: str, stdin: str | bytes = b"", ckpt: Path = talker) -> tuple[int, str, str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        return command("generate", ckpt, "--max-new-tokens", "8", *arguments)

    return run


def chat_ids(messages: list[dict[str, Any]]) -> list[int]:
    made = reference("llama3").apply_chat_template(messages, add_generation_prompt=True)
    return list(made["input_ids"])


def test_a_text_is_completed_and_streamed(run: Any, talker: Path) -> None:
    status, out, _ = run("--prompt", "Hello", "--json")
    shown = json.loads(out)
    ids = tokenizer().encode("Hello").ids
    assert status == 0
    assert shown["tokens"] == answer_of_transformers(talker, ids, 8)
    assert shown["finish_reason"] == "length"
    assert shown["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 8,
        "total_tokens": len(ids) + 8,
    }
    assert run("--prompt", "Hello")[1] == "Hello" + shown["text"] + "\n"
    assert run("--prompt", "-", stdin="Hello\n")[1] == "Hello" + shown["text"] + "\n"
    stop = shown["text"][3:5]
    assert (
        json.loads(run("--prompt", "Hello", "--json", "--stop", stop)[1])["text"]
        == (shown["text"].partition(stop)[0])
    )


def test_a_chat_on_standard_input_is_answered_as_transformers_does(run: Any, talker: Path) -> None:
    system = {"role": "system", "content": "Be brief"}
    for sent, messages in [
        (HI, [HI]),
        ([system, HI], [system, HI]),
        ({"messages": [system, HI]}, [system, HI]),
    ]:
        status, out, err = run("--json", stdin=json.dumps(sent))
        assert status == 0, err
        want = answer_of_transformers(talker, chat_ids(messages), 8)
        assert json.loads(out)["tokens"] == want
        assert run(stdin=json.dumps(sent))[1] == tokenizer().decode(want) + "\n"
    same = run("--prompt", HI["content"], "--system", "Be brief", "--json")[1]
    assert json.loads(same)["tokens"] == want
    assert json.loads(run("--prompt", HI["content"], "--chat", "--json")[1])["tokens"] == (
        answer_of_transformers(talker, chat_ids([HI]), 8)
    )


def test_a_file_of_prompts_gives_what_each_gives_alone(run: Any, tmp_path: Path) -> None:
    lines = ["Hello", {"prompt": "A longer prompt, of text"}, HI, [HI], {"messages": [HI]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    status, out, err = run("--file", str(file))
    assert status == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert answers[0] == json.loads(run("--prompt", "Hello", "--json")[1])
    assert answers[1] == json.loads(run("--prompt", "A longer prompt, of text", "--json")[1])
    assert answers[2] == answers[3] == answers[4]
    assert answers[2] == json.loads(run("--json", stdin=json.dumps(HI))[1])


def test_logprobs_are_of_each_token_and_sum_to_what_they_should(run: Any) -> None:
    shown = json.loads(run("--prompt", "Hello", "--json", "--logprobs", "2")[1])
    assert [entry["id"] for entry in shown["logprobs"]] == shown["tokens"]
    for entry in shown["logprobs"]:
        assert entry["top"][0]["id"] == entry["id"], "greedy takes the likeliest"
        assert entry["logprob"] == pytest.approx(entry["top"][0]["logprob"])
        assert entry["token"] == tokenizer().id_to_token(entry["id"])


def test_generation_config_is_for_chats_and_flags_go_before_it(run: Any, tmp_path: Path) -> None:
    hot = {"do_sample": True, "temperature": 5.0, "top_k": 20}
    sampled = make_talker(tmp_path / "hf", "llama3", **hot)

    def tokens(*flags: str, ckpt: Path) -> list[int]:
        return list(json.loads(run("--json", *flags, stdin=json.dumps(HI), ckpt=ckpt)[1])["tokens"])

    flags = ["--temperature", "5.0", "--top-k", "20", "--seed", "3"]
    greedy = make_talker(tmp_path / "greedy", "llama3")
    assert tokens("--seed", "3", ckpt=sampled) == tokens(*flags, ckpt=greedy)
    assert tokens("--seed", "3", ckpt=sampled) != tokens(ckpt=greedy)
    assert tokens("--temperature", "0", ckpt=sampled) == tokens(ckpt=greedy)
    text = [json.loads(run("--prompt", "Hi", "--json", ckpt=c)[1]) for c in (sampled, greedy)]
    assert text[0] == text[1], "a plain completion is greedy"


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        ([], "", "standard input is empty; nothing to complete: pass --prompt TEXT"),
        ([], "hello", "standard input: is no JSON"),
        ([], "[" * 100_000, "standard input: is no JSON"),
        ([], b"\xff\xfe", "standard input is no UTF-8"),
        ([], "5", "standard input: is no prompt"),
        ([], "[]", "messages is empty"),
        ([], '{"role": "wizard", "content": "x"}', "role is 'wizard'"),
        ([], '{"messages": [{"role": "user"}], "tools": [1]}', "tools[0]"),
        (["--prompt", "a", "--file", "b"], "", "--prompt and --file are both given"),
        (["--file", "nowhere.jsonl"], "", "nowhere.jsonl"),
        (["--prompt", ""], "", "has no tokens"),
        (["--prompt", "a", "--temperature", "-1"], "", "temperature is -1"),
        (["--prompt", "a", "--top-p", "nan"], "", "top_p is nan"),
        (["--prompt", "a", "--stop", ""], "", "a stop string is empty"),
        (["--system", "a"], '{"role": "system", "content": "x"}', "system message of its own"),
        (["--chat", "--prompt", "a", "--chat-template", "no.jinja"], "", "no.jinja: cannot be"),
    ],
    ids=range(16),
)
def test_what_is_no_prompt_is_refused_in_one_line(
    run: Any, arguments: list[str], stdin: str | bytes, says: str
) -> None:
    status, out, err = run(*arguments, stdin=stdin)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert says in err and "unexpected" not in err


def test_text_that_is_no_unicode_is_read(run: Any) -> None:
    assert run("--prompt", "a\udcff", "--json")[0] == 0
    assert run("--json", stdin='{"role": "user", "content": "a\\ud800b"}')[0] == 0
