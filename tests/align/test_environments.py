"""Answers of several turns: what the environment says is part of the sequence as the chat template
has it, is not learned, and the engine's log-probabilities stay those of the trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tokenizers import Tokenizer, decoders

from bevatron.align.environment_config import EnvironmentConfig
from bevatron.align.environments import Environment
from bevatron.align.locked_python import Limits
from bevatron.align.problems import Problem
from bevatron.align.rollouts import Ask, Ends
from bevatron.align.tools import answer_of, calculated
from bevatron.align.turns import Turns
from bevatron.data.chat_examples import ChatExamples
from bevatron.errors import BevatronError
from bevatron.generate.request import Generation, Request, Sampling, TokenLogprob
from tests.align.rl_run import lines, prepare_rl
from tests.align.test_rewards_code import locked
from tests.processes import Pool
from tests.train.tiny_run import train

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NANOCHAT = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
REPLIES = """\
def reply(row, messages):
    said = [m for m in messages if m["role"] == "assistant"]
    if row.get("fails"):
        raise ValueError("no")
    if row.get("nonsense"):
        return "text"
    return [{"role": "user", "content": f"again {len(said)}"}] if len(said) < 3 else None
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model is a chat model: half of its tokens end a turn."""
    made = prepare_rl(tmp_path_factory.mktemp("environment") / "run")
    path = made / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", *NANOCHAT])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (made / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    ends = {"eos_token_id": list(range(150))}
    (made / "tokenizer" / "generation_config.json").write_text(json.dumps(ends))
    (made / "replies.py").write_text(REPLIES)
    return made


# --- tools


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(1 + 2) * -3", "-9"),
        ("7 / 2", "3.5"),
        ("1,000 * 3", "3000"),
        ("2 ^ 10", "1024"),
        ("0.1 + 0.2", "0.3"),
        ('"strawberry".count("r")', "3"),
        ("9**9**9**9", "error: too large"),
        ("1 / 0", "error: division by zero"),
        ("__import__('os').system('true')", "error: not an expression of numbers"),
        ("a + 1", "error: not an expression of numbers"),
        ("(" * 150, "error: not an expression of numbers"),
        ("True + 1", "error: not an expression of numbers"),
        ("1e308 * 10", "error: too large"),
        ("1" * 201, "error: longer than 200 characters"),
    ],
)
def test_the_calculator_computes_numbers_and_nothing_else(expression: str, value: str) -> None:
    assert answer_of("calculator", {"expression": expression}, Limits()) == value
    if not value.startswith("error"):
        assert calculated(expression) == value


@locked
def test_python_answers_with_what_it_prints() -> None:
    limits = Limits(seconds=60.0)
    assert answer_of("python", {"code": "print(6 * 7)"}, limits) == "42"
    assert answer_of("python", {"code": "x = 1"}, limits) == "(no output)"
    assert answer_of("python", {"code": "print(1)\n1/0"}, limits).startswith("1\nerror: ZeroDiv")
    loop = {"code": "while 1: pass"}
    assert answer_of("python", loop, Limits(seconds=1.0)) == "error: takes more than 1 s"
    assert answer_of("python", {"program": "1"}, limits).startswith("error: python takes one")
    assert answer_of("other", {}, limits) == "error: there is no tool 'other'"


def test_calls_are_understood_in_the_forms_that_models_write() -> None:
    call = '{"name": "calculator", "arguments": {"expression": "6*7"}}'
    with Environment(EnvironmentConfig(tools=["calculator"])) as environment:
        for text in (
            call,
            f"<tool_call>\n{call}\n</tool_call>",
            f"Let me see. <tool_call>{call}</tool_call>",
            f"<TOOLCALL>[{call}]</TOOLCALL>",
            '<|python_tag|>calculator.call(expression="6*7")',
        ):
            (said,) = environment.reply({}, [{"role": "assistant", "content": text}]) or [{}]
            assert said == {"role": "tool", "name": "calculator", "content": "42"}, text
        for text in ("42", "calculator(6*7)", '{"name": "other", "arguments": {}}'):
            assert environment.reply({}, [{"role": "assistant", "content": text}]) is None


def test_a_function_of_the_users_answers_and_its_failure_ends_the_answer(folder: Path) -> None:
    config = EnvironmentConfig(path=str(folder / "replies.py"), seconds=60.0)
    said = [{"role": "assistant", "content": "a"}]
    with Environment(config) as environment:
        assert environment.reply({}, said) == [{"role": "user", "content": "again 1"}]
        assert environment.reply({}, said * 3) is None
        assert environment.reply({"fails": True}, said) is None
        assert environment.reply({"nonsense": True}, said) is None
        first, second = environment.notes
        assert "environment reply raises ValueError at replies.py:4: no" in first
        assert "returns 'text', expected a list of messages or None" in second
        assert environment.reply({}, said) is not None
    with pytest.raises(BevatronError, match="has no function 'other'"):
        Environment(EnvironmentConfig(path=str(folder / "replies.py"), function="other"))


# --- token by token


class Scripted:
    """An engine whose answers are known."""

    def __init__(self, tokenizer: Any, answers: list[str]) -> None:
        self.tokenizer, self.answers = tokenizer, answers

    def complete(self, requests: Sequence[Request]) -> list[Generation]:
        out = []
        for request in requests:
            text = self.answers.pop(0)
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            ended = ids[-1] in request.stop_tokens
            ids = ids[: request.max_new_tokens]
            logprobs = [TokenLogprob(id, -0.5) for id in ids]
            reason = "stop" if ended and len(ids) < request.max_new_tokens else "length"
            out.append(Generation(text.removesuffix("<|im_end|>"), ids, reason, logprobs))
        return out


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def rolled(folder: Path, config: EnvironmentConfig, answers: list[str], longest: int = 400) -> Any:
    chats = ChatExamples.open(folder / "tokenizer")
    encoder = chats.tokenizer.encoder
    prompt = [{"role": "user", "content": "6*7?"}]
    ids = tuple(chats.prompt(prompt))
    ask = Ask(0, ids, Sampling(), Problem({}, prompt))
    ends = Ends(frozenset({encoder.token_to_id("<|im_end|>")}), (), frozenset())
    with Environment(config) as environment:
        turns = Turns(config, chats, environment)
        engine: Any = Scripted(encoder, answers)
        (out,) = turns(engine, [ask], ends, longest, 500)
    return out, encoder, chats, len(ids)


def test_a_tools_answer_is_in_the_sequence_and_not_learned(folder: Path, alone: Any) -> None:
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'
    config = EnvironmentConfig(tools=["calculator"])
    out, encoder, chats, n = rolled(folder, config, [f"{call}<|im_end|>", "It is 42.<|im_end|>"])
    messages = [
        {"role": "user", "content": "6*7?"},
        {"role": "assistant", "content": call},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    whole = chats.template.encode(messages, add_generation_prompt=False)
    assert out.ids == whole[: len(out.ids)] and len(whole) == len(out.ids) + 1  # the last newline
    assert out.text == "It is 42." and out.finished
    assert [m["role"] for m in out.messages] == ["assistant", "tool", "assistant"]
    learned = [id for id, is_learned in zip(out.ids, out.learned, strict=True) if is_learned]
    assert learned == out.said
    said = encoder.decode(learned, skip_special_tokens=False)
    assert said == f"{call}<|im_end|>It is 42.<|im_end|>"
    for logprob, is_learned in zip(out.logprobs, out.learned, strict=True):
        assert logprob == (-0.5 if is_learned else 0.0)
    assert len(out.ids) == len(out.learned) == len(out.logprobs) and not any(out.learned[:n])


def test_a_conversation_ends_in_time(folder: Path, alone: Any) -> None:
    call = '{"name": "calculator", "arguments": {"expression": "1"}}<|im_end|>'
    config = EnvironmentConfig(tools=["calculator"], turns=2)
    out, *_ = rolled(folder, config, [call] * 5)
    assert [m["role"] for m in out.messages] == ["assistant", "tool", "assistant"]
    # An answer that is cut off is not asked about, nor one that leaves no room for another.
    out, *_ = rolled(folder, config, ["x" * 99], longest=20)
    assert not out.finished and len(out.said) == 20 and len(out.messages) == 1
    out, *_ = rolled(folder, config, [call] * 2, longest=70)
    assert not out.finished and [m["role"] for m in out.messages] == ["assistant"]
    assert out.said == out.ids[-len(out.said) :]


def test_nanochats_calculator_answers_within_the_answer(folder: Path, alone: Any) -> None:
    config = EnvironmentConfig(tools=["calculator"], form="nanochat")
    asks = "It is <|python_start|>6*7<|python_end|>"
    out, encoder, _, n = rolled(folder, config, [asks, " so 42.<|im_end|>"])
    text = encoder.decode(out.ids[n:], skip_special_tokens=False)
    assert text == f"{asks}<|output_start|>42<|output_end|> so 42.<|im_end|>"
    assert out.text == f"{asks}<|output_start|>42<|output_end|> so 42."
    unlearned = [
        i for i, is_learned in zip(out.ids[n:], out.learned[n:], strict=True) if not is_learned
    ]
    assert (
        encoder.decode(unlearned, skip_special_tokens=False) == "<|output_start|>42<|output_end|>"
    )


def test_what_has_no_place_for_tools_is_refused(folder: Path, tmp_path: Path) -> None:
    prepare_rl(tmp_path / "bare")
    chats = ChatExamples.open(tmp_path / "bare" / "tokenizer")
    config = EnvironmentConfig(tools=["calculator"])
    with pytest.raises(BevatronError, match="no chat template"):
        Turns(config, chats, None)
    nanochat = EnvironmentConfig(tools=["calculator"], form="nanochat")
    with pytest.raises(BevatronError, match=r"has no token <\|python_start\|>"):
        Turns(nanochat, chats, None)
    for keys, said in (
        ({}, "give either tools"),
        ({"tools": ["python"], "form": "nanochat"}, "has one tool"),
        ({"tools": ["shell"]}, "calculator"),
    ):
        with pytest.raises(ValueError, match=said):
            EnvironmentConfig.model_validate(keys)


# --- real runs


def test_a_run_with_several_turns_is_the_same_at_two_layouts(folder: Path, pool: Pool) -> None:
    """A real engine and a real trainer agree about every token that the model said, with what the
    environment said in between."""
    (folder / "problems.jsonl").write_text(json.dumps({"prompt": "a", "rest": 0}) + "\n")
    keys = [
        "objective.problems={chat: true}",
        "objective.environment={path: replies.py, seconds: 60.0}",
    ]
    keys += ["objective.max_completion_length=60", "data.seq_len=120", "train.steps=2"]
    keys += ["objective.loss=grpo", "checkpoint.every=0"]
    pool.run(1, train, folder, *keys, "run.dir=turns-1")
    pool.run(2, train, folder, *keys, "run.dir=turns-2", "parallel.tp=2")
    one, two = lines(folder / "turns-1"), lines(folder / "turns-2")
    made = [
        json.loads(line)
        for line in (folder / "turns-1/rollouts/step-00000001.jsonl").read_text().splitlines()
    ]
    turns = [len(line["messages"]) for line in made]
    assert max(turns) == 5 and any(line["finished"] for line in made)
    spoken = [m for line in made for m in line["messages"] if m["role"] == "user"]
    assert spoken and all(m["content"].startswith("again") for m in spoken)
    for a, b in zip(one, two, strict=True):
        assert a["sampling/sampling_logp_difference/max"] < 1e-4
        assert b["sampling/sampling_logp_difference/max"] < 1e-4
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
