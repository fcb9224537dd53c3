"""`bevatron generate`: texts, chats as JSON on standard input, files of prompts."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bevatron.generate.request import Request
from bevatron.generate.sampling_options import model_name
from bevatron.parallel.process_groups import choose_device, default_device
from tests.chat.chat_templates import reference, tokenizer
from tests.faults.refusal import command
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


def test_generation_config_is_for_all_and_flags_go_before_it(run: Any, tmp_path: Path) -> None:
    hot = {"do_sample": True, "temperature": 5.0, "top_k": 20}
    sampled = make_talker(tmp_path / "hf", "llama3", **hot)

    def answer(*flags: str, ckpt: Path) -> tuple[list[int], str]:
        status, out, err = run("--json", *flags, stdin=json.dumps(HI), ckpt=ckpt)
        assert status == 0
        return list(json.loads(out)["tokens"]), err

    def tokens(*flags: str, ckpt: Path) -> list[int]:
        return answer(*flags, ckpt=ckpt)[0]

    flags = ["--temperature", "5.0", "--top-k", "20", "--seed", "3"]
    greedy = make_talker(tmp_path / "greedy", "llama3")
    assert tokens("--seed", "3", ckpt=sampled) == tokens(*flags, ckpt=greedy)
    assert tokens("--seed", "3", ckpt=sampled) != tokens(ckpt=greedy)
    assert tokens("--temperature", "0", ckpt=sampled) == tokens(ckpt=greedy)
    said = "sampled as generation_config.json says: temperature 5, top_k 20; --temperature 0 is"
    assert answer(ckpt=sampled)[1].startswith(said)
    assert answer("--temperature", "0", ckpt=sampled)[1] == answer(ckpt=greedy)[1] == ""
    ways = [([], sampled), (flags[:4], greedy), ([], greedy), (flags[:2], sampled)]
    made = [json.loads(run("--prompt", "Hi", "--json", *f, ckpt=c)[1]) for f, c in ways]
    text = [answer["tokens"] for answer in made]
    assert text[0] == text[1] == text[3] != text[2], "a plain completion is no exception"


def test_every_verb_reads_generation_config_alike(tmp_path: Path) -> None:
    """As transformers does: without `do_sample` it is greedy, with a repetition penalty if any."""
    import transformers

    from bevatron.generate.engine import Engine
    from bevatron.generate.request import Sampling
    from bevatron.generate.sampling_options import in_words
    from bevatron.generate.server.served_model import Serving
    from bevatron.generate.server.server_settings import Settings

    folder = make_talker(tmp_path / "hf", "llama3")
    file = folder / "generation_config.json"
    for config, expected, words in (
        ({}, Sampling(), "greedy"),
        ({"temperature": 0.6, "top_p": 0.9}, Sampling(0.0, top_p=0.9), "greedy"),
        ({"do_sample": False, "repetition_penalty": 1.5}, Sampling(repetition_penalty=1.5),
         "greedy, repetition_penalty 1.5"),
        ({"do_sample": True}, Sampling(1.0, top_k=50), "temperature 1, top_k 50"),
        ({"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.95},
         Sampling(0.6, top_p=0.95), "temperature 0.6, top_p 0.95"),
    ):  # fmt: skip
        file.write_text(json.dumps(config))
        with Engine.open(folder) as engine:
            assert engine.sampling == expected
            assert in_words(engine.sampling) == words
            serving = Serving(engine, Settings("m"))
            assert serving.defaults["temperature"] == expected.temperature
            assert Sampling(**serving.defaults) == expected
            if config.get("repetition_penalty"):
                ids = chat_ids([HI])
                model = transformers.AutoModelForCausalLM.from_pretrained(folder)
                out = model.generate(torch.tensor([ids]), max_new_tokens=8)
                request = Request(tuple(ids), 8, engine.sampling)
                assert engine.complete([request])[0].tokens == out[0, len(ids) :].tolist()
    file.write_text('{"do_sample": true, "top_p": 7}')
    status, _, err = command("generate", folder, "--prompt", "x")
    assert status == 2 and "generation_config.json: top_p is 7" in err


def test_device_and_dtype_are_what_was_asked_for(
    talker: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bevatron.generate.engine import Engine

    plain = json.loads(run("--prompt", "Hello", "--json")[1])
    same = run("--prompt", "Hello", "--json", "--device", "cpu", "--dtype", "fp32")[1]
    assert json.loads(same) == plain
    with Engine.open(talker, device="cpu", dtype="bf16") as engine:
        assert engine.group.model.dtype == torch.bfloat16
    for flags, says in (
        (["--dtype", "int4"], "int4"),
        (["--device", "gpu"], "device gpu: there is no such kind; use cpu"),
        (["--device", "xpu"], "device xpu: not on this machine; use cpu"),
    ):
        status, out, err = run("--prompt", "a", *flags)
        assert (status, out) == (2, "") and says in err and err.count("\n") == 1, err
    # Apple's accelerator has no collectives and no FSDP: it is taken by name alone.
    mps = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **kwargs: mps)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert default_device() == choose_device(None) == torch.device("cpu")
    assert choose_device("mps") == mps


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/mine", "mine"),
        ("runs/mine/step-00000006", "mine-step-6"),
        ("a/native", "native"),
        ("org/hub-id", "org/hub-id"),
    ],
)
def test_models_are_called_by_their_run(
    path: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if not path.startswith("org"):
        Path(path).mkdir(parents=True)
    assert model_name(path) == name


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        ([], "", "standard input is empty; nothing to complete: pass --prompt TEXT"),
        ([], "hello", "standard input: is not JSON"),
        ([], "[" * 100_000, "standard input: is not JSON"),
        ([], b"\xff\xfe", "standard input is not UTF-8"),
        ([], "5", "standard input: is not a prompt"),
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
        (["--prompt", "a", "--chat-template", "no.jinja"], "", "without a template; pass --chat"),
        (["--prompt", "a", "--logprobs", "2"], "", "--logprobs needs --json"),
    ],
    ids=range(18),
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
