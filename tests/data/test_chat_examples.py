"""What is learned of a conversation: with published tokenizers and templates, exactly the answers
and the tokens that end them, each behind the prompt that the model would be given for it.

Compared with transformers' masks by the templates that TRL has for training.
"""

from __future__ import annotations

import shutil
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from bevatron.chat.chat_messages import ChatError
from bevatron.chat.chat_template import ChatTemplate, Folder
from bevatron.data.chat_examples import ChatExamples, Example
from bevatron.data.tokenizer import OpenTokenizer, open_tokenizer
from bevatron.errors import BevatronError
from tests.chat.chat_templates import LLAMA2
from tests.labelled_data import save_tokenizer
from tests.real import smollm2, tokenizers

END = {
    "smollm2": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "qwen3": "<|im_end|>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
    "gemma3": "<end_of_turn>",
    "llama2": " </s>",
}
GEMMA = pytest.param("gemma3", marks=pytest.mark.slow)  # 262,144 tokens take ten seconds to open
USER = {"role": "user", "content": "2 + 2?"}
SUMS = [USER, {"role": "assistant", "content": "It is 4."}]
SUMS += [{"role": "user", "content": "And 3 + 3 é 🙂?"}, {"role": "assistant", "content": "6"}]
THOUGHT = {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nIt is 4."}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.",
          "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}]  # fmt: skip
CALL = {"function": {"name": "add", "arguments": {"a": 2}}, "type": "function", "id": "1"}
CALLED = [USER, {"role": "assistant", "tool_calls": [CALL]},
          {"role": "tool", "content": "four", "tool_call_id": "1"}, SUMS[1]]  # fmt: skip


def folder(name: str) -> Path:
    return smollm2.folder() if name == "smollm2" else tokenizers.folder(name)


def trl_template(name: str) -> Path:
    """A template of TRL, which has many models' own and others for training."""
    found = find_spec("trl")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "chat_templates" / f"{name}.jinja"


@lru_cache
def tokenizer(name: str) -> OpenTokenizer:
    """Large ones take seconds to open."""
    return open_tokenizer(folder(name))


@lru_cache
def theirs(name: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder(name))


def with_template(name: str, file: Path | None, **options: bool) -> ChatExamples:
    """As `ChatExamples.open` makes them."""
    opened = tokenizer(name)
    files = Folder(opened.file.parent)
    template = (
        ChatTemplate.of(files, opened.encoder)
        if file is None
        else ChatTemplate.needed(files, opened.encoder, file)
    )
    return ChatExamples(opened, template, **options)


def opened(name: str, template: str | None = None) -> ChatExamples:
    return with_template(name, trl_template(template) if template else None)


def parts(examples: ChatExamples, example: Example) -> list[str]:
    """The texts that are learned, each apart."""
    decode, out, inside = examples.tokenizer.encoder.decode, [], False
    ids: list[int] = []
    for id, learned in [*zip(example.ids, example.learned, strict=True), (0, False)]:
        if learned:
            ids.append(int(id))
        elif inside:
            out.append(decode(ids, skip_special_tokens=False))
            ids = []
        inside = bool(learned)
    return out


@pytest.mark.parametrize("name", ["smollm2", "llama3_1", "deepseek_v3", GEMMA])
def test_the_answers_and_their_ends_are_learned_and_nothing_else(name: str) -> None:
    examples = opened(name)
    assert not examples.template.marks_answers()  # type: ignore[union-attr]
    example = examples.messages([{"role": "system", "content": "detailed thinking off"}, *SUMS])
    assert parts(examples, example) == ["It is 4." + END[name], "6" + END[name]]
    chat = [{"role": "system", "content": "detailed thinking off"}, *SUMS]
    assert example.ids.tolist() == theirs(name).apply_chat_template(chat)["input_ids"]


def test_llama_2s_answers_end_where_its_template_says(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(LLAMA2)
    examples = with_template("llama2", tmp_path / "own.jinja")
    assert parts(examples, examples.messages(SUMS)) == ["It is 4. </s>", "6 </s>"]


def test_an_answer_that_is_written_otherwise_later_is_learned_as_it_was_said() -> None:
    """Qwen3 drops earlier thoughts: the first answer is learned from a text that ends with it."""
    examples = opened("qwen3")
    chat = [USER, THOUGHT, SUMS[2], {"role": "assistant", "content": "", "reasoning_content": "3"}]
    first, second = examples.conversation(chat)
    assert parts(examples, first) == [THOUGHT["content"] + "<|im_end|>"]
    assert parts(examples, second) == ["<think>\n3\n</think>\n\n<|im_end|>"]
    decoded = examples.tokenizer.encoder.decode(second.ids.tolist(), skip_special_tokens=False)
    assert "Easy." not in decoded, "what the model is not given then"
    with pytest.raises(ChatError, match="makes 2 examples where one is needed; give the earlier"):
        examples.messages(chat)
    only = examples.completion(chat[:3], chat[3:])
    assert only.ids.tolist() == second.ids.tolist()
    assert only.learned.tolist() == second.learned.tolist()


def test_gpt_oss_ends_an_answer_by_another_token_when_the_chat_goes_on() -> None:
    examples = opened("gptoss", "gptoss")
    found = [parts(examples, example) for example in examples.conversation(SUMS)]
    end = "<|channel|>final<|message|>{}<|return|>"
    assert found == [[end.format("It is 4.")], [end.format("6")]]


def test_a_call_is_learned_and_what_the_tool_says_is_not() -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
    for name, template, calls in (
        ("qwen3", "qwen2_5", call),
        ("llama3_1", "llama3_1", '{"name": "add", "parameters": {"a": 2}}<|eot_id|>'),
    ):
        examples = opened(name, template)
        example = examples.messages(CALLED, TOOLS)
        assert parts(examples, example) == [calls, "It is 4." + END[name]]
        decoded = examples.tokenizer.encoder.decode(example.ids.tolist())
        assert "four" in decoded and "Adds." in decoded


@pytest.mark.parametrize(
    ("name", "template", "chat", "tools"),
    [
        ("llama3_1", "llama3_training", SUMS, None),
        ("qwen3", "qwen2_5_training", CALLED, TOOLS),
        ("qwen3", "qwen3_training", [USER, THOUGHT, *SUMS[2:]], None),
        ("qwen3", "qwen3_training", CALLED, TOOLS),
        pytest.param("gemma3", "gemma3_training", SUMS, None, marks=pytest.mark.slow),
        ("deepseek_v3", "deepseekv3_training", SUMS, None),
        ("gptoss", "gptoss_training", SUMS, None),
        ("smollm2", "qwen2_5_training", SUMS, None),
    ],
)
def test_templates_with_marks_have_the_masks_that_trl_trains_with(
    name: str, template: str, chat: list[dict[str, Any]], tools: Any
) -> None:
    want = theirs(name).apply_chat_template(
        chat, tools=tools, chat_template=trl_template(template).read_text("utf-8"),
        return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    example = opened(name, template).messages(chat, tools)
    assert example.ids.tolist() == want["input_ids"]
    assert example.learned.tolist() == [bool(one) for one in want["assistant_masks"]]
    assert example.learned.any()


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("llama3_1", "llama3"),
        ("qwen3", "qwen2_5"),
        pytest.param("gemma3", "gemma3", marks=pytest.mark.slow),
    ],
)
def test_comparing_renderings_finds_what_the_marks_say(name: str, template: str) -> None:
    """The same template with and without marks, but for spaces around an answer."""
    bare, marked = opened(name, template), opened(name, f"{template}_training")
    one, other = bare.messages(SUMS), marked.messages(SUMS)
    assert one.ids.tolist() == other.ids.tolist()
    assert [p.strip() for p in parts(marked, other)] == parts(bare, one)


def changed(name: str, old: str, new: str, tmp_path: Path) -> ChatExamples:
    """TRL's template with a change."""
    text = trl_template(name).read_text("utf-8")
    assert old in text
    (tmp_path / "own.jinja").write_text(text.replace(old, new))
    return with_template("qwen3", tmp_path / "own.jinja")


def test_marks_that_leave_out_the_end_are_completed(tmp_path: Path) -> None:
    """The end of turn missing from the mask: such a model never stops."""
    end = "{{- '<|im_end|>\\n' }}\n        {%- endgeneration %}"
    late = "{%- endgeneration %}{{- '<|im_end|>\\n' }}"
    examples = changed("qwen3_training", end, late, tmp_path)
    assert [p[-20:] for p in parts(examples, examples.messages(SUMS))] == [
        "\n\nIt is 4.<|im_end|>",
        "/think>\n\n6<|im_end|>",
    ]


def test_an_answer_that_nothing_ends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    examples = with_template("qwen3", tmp_path / "own.jinja")
    with pytest.raises(ChatError, match=r"own.jinja: no token ends the assistant's turn"):
        examples.messages(SUMS)


def test_a_template_whose_answers_do_not_follow_its_prompts_is_refused() -> None:
    """DeepSeek's later ones begin the thoughts in the prompt and drop them from answers."""
    said = r"deepseekv3.jinja: the template does not write an answer behind .* on '<think>\\n'"
    with pytest.raises(ChatError, match=said):
        opened("deepseek_v3", "deepseekv3").messages(SUMS)


def test_nothing_of_an_answer_is_lost_in_silence() -> None:
    with pytest.raises(ChatError, match="leaves out the reasoning_content of an answer"):
        opened("llama3_1").messages([USER, SUMS[1] | {"reasoning_content": "Easy."}])
    with pytest.raises(ChatError, match="leaves out the content of an answer"):
        opened("llama3_1", "llama3_1").messages([USER, CALLED[1] | {"content": "I add."}], TOOLS)
    with pytest.raises(ChatError, match="no message of the assistant is there to learn"):
        opened("qwen3").messages([USER])


def test_the_systems_switch_of_reasoning_is_given_and_not_learned() -> None:
    """Llama-Nemotron's: the same prompt in both modes."""
    examples = opened("llama3_1")
    for mode, answer in (("on", THOUGHT), ("off", SUMS[1])):
        chat = [{"role": "system", "content": f"detailed thinking {mode}"}, USER, answer]
        example = examples.messages(chat)
        assert parts(examples, example) == [answer["content"] + "<|eot_id|>"]
        assert example.ids[: -int(example.learned.sum())].tolist() == examples.prompt(chat[:2])


def test_all_of_a_conversation_may_be_learned() -> None:
    whole = with_template("smollm2", None, assistant_only=False)
    example = whole.messages(SUMS)
    assert example.learned.tolist() == [False] + [True] * (len(example) - 1)
    given = whole.prompt(SUMS[:3])
    example = whole.completion(SUMS[:3], SUMS[3:])
    assert example.learned.tolist() == [i >= len(given) for i in range(len(example))]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ChatExamples:
    texts = ["the cat sat on the mat"] * 9
    return ChatExamples.open(save_tokenizer(tmp_path_factory.mktemp("plain"), texts))


def test_a_prompt_and_its_completion_are_tokenized_in_one_piece(plain: ChatExamples) -> None:
    own = transformers.AutoTokenizer.from_pretrained(plain.tokenizer.file.parent)
    for prompt, completion, split in (
        ("the cat", " sat", 0),
        ("the cat ", "sat", 1),  # " sat" is one token
        ("the c", "at sat", 1),
        ("", "the cat", 0),
        ("the cat", "", 0),
    ):
        example = plain.completion(prompt, completion)
        assert example.ids.tolist() == own(prompt + completion + "</s>")["input_ids"]
        alone = own(prompt)["input_ids"]
        common = int(
            np.argmin([a == b for a, b in zip(alone, example.ids, strict=False)] + [False])
        )
        assert example.learned.tolist() == [i >= common for i in range(len(example))]
        assert example.split == split
        assert plain.prompt(prompt) == alone


def test_a_text_is_learned_whole_with_its_end(plain: ChatExamples) -> None:
    example = plain.text("the cat sat</s>")
    assert example.ids.tolist().count(1) == 1 and example.ids[-1] == 1
    assert example.learned.tolist() == [False] + [True] * (len(example) - 1)
    both = plain.completion(" sat", " on")
    assert both.learned.tolist() == [False, False, True, True]


def test_what_cannot_be_read_is_named(plain: ChatExamples, tmp_path: Path) -> None:
    with pytest.raises(ChatError, match="has no chat template beside it, as base models have none"):
        plain.messages(SUMS)
    with pytest.raises(ChatError, match="a text and a list of messages; expected two of a kind"):
        plain.completion("a", SUMS)
    shutil.copy(plain.tokenizer.file, tmp_path)
    with pytest.raises(BevatronError, match="no eos token is named beside it"):
        ChatExamples.open(tmp_path).text("a")
