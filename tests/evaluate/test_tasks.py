"""Tasks of lm-evaluation-harness on a native checkpoint have the scores of `--model hf` on the
export, request by request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bevatron.cli.main import app
from bevatron.errors import BevatronError
from tests.evaluate.local_tasks import NAMES, write_tasks
from tests.server.served import served

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness: pip install 'bevatron[eval]'"
)

TEXT = Path(json.__file__).read_text()
TEXTS = [TEXT[i : i + 400] for i in range(0, 3200, 400)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("lm_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        # Else lm_eval reads its own thousands of tasks first, for half a minute
        few = partial(import_module("lm_eval.tasks").TaskManager, include_defaults=False)
        patch.setattr("lm_eval.tasks.TaskManager", few)
        yield write_tasks(folder / "tasks", TEXTS)


def evaluate(tasks: Path, model: str, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(NAMES),
        task_manager=import_module("lm_eval.tasks").TaskManager(include_path=str(tasks)),
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )
    assert found is not None
    return found


def answers(found: dict[str, Any]) -> dict[str, list[Any]]:
    """What the model said to each request, before any metric."""
    return {name: [s["resps"] for s in found["samples"][name]] for name in NAMES}


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"apply_chat_template": True}, marks=pytest.mark.slow)],
    ids=["plain", "chat"],
)
def test_every_answer_is_that_of_lm_evals_own_class(
    model: Path, tasks: Path, options: dict[str, Any]
) -> None:
    import bevatron.evaluate.lm_eval_model  # noqa: F401

    hf = {"pretrained": str(model / "hf"), "dtype": "float32"}
    expected = evaluate(tasks, "hf", hf, device="cpu", **options)
    found = evaluate(tasks, "bevatron", {"pretrained": str(model / "native")}, **options)
    agree(expected, found)


@pytest.mark.slow
def test_layouts_change_no_answer(model: Path, tasks: Path) -> None:
    import bevatron.evaluate.lm_eval_model  # noqa: F401

    native = {"pretrained": str(model / "native")}
    alone = evaluate(tasks, "bevatron", native)
    agree(alone, evaluate(tasks, "bevatron", {**native, "tp": 2, "pp": 2}))


@pytest.mark.slow
def test_the_unchanged_lm_eval_has_the_same_scores_through_our_server(
    model: Path, tasks: Path
) -> None:
    """Its own client for OpenAI's completions, which sends tokens and wants their logprobs back."""
    # Its class counts a generated token into the length, and one more for rolling windows
    hf = {"pretrained": str(model / "hf"), "dtype": "float32", "max_length": 44}
    expected = evaluate(tasks, "hf", hf, device="cpu")
    with served(model / "native", "--max-batch", "8") as server:
        api = {"model": server.model, "base_url": f"{server.url}/v1/completions", "max_length": 46}
        api |= {"tokenizer_backend": "huggingface", "tokenizer": str(model / "hf")}
        api |= {"tokenized_requests": True, "num_concurrent": 4, "add_bos_token": True}
        agree(expected, evaluate(tasks, "local-completions", api))


def agree(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """In every answer, and so in every score."""
    a, b = answers(expected), answers(found)
    assert a["local_until"] == b["local_until"]
    assert len({str(s) for s in a["local_until"]}) > 4  # not always the same
    for name in NAMES[:2]:
        for one, two in zip(_numbers(a[name]), _numbers(b[name]), strict=True):
            assert one == pytest.approx(two, rel=1e-4, abs=1e-4)
    for name in NAMES:
        for metric, value in expected["results"][name].items():
            if isinstance(value, float):
                assert found["results"][name][metric] == pytest.approx(value, rel=1e-4)


def _numbers(found: Any) -> list[float]:
    if isinstance(found, list | tuple):
        return [n for part in found for n in _numbers(part)]
    return [float({"True": 1, "False": 0}.get(found, found))]


def test_the_command_passes_on_the_flags_of_lm_eval(
    model: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", str(model / "native"), "--tasks", "local_choice,local_until", "--json"]
    line += ["--include_path", str(tasks), "--limit", "3", "--num_fewshot", "1", "--device", "cpu"]
    app([*line, "--model_args", "max_length=48"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert set(found["results"]) == {"local_choice", "local_until"}
    assert found["n-samples"]["local_choice"]["effective"] == 3
    assert found["n-shot"]["local_choice"] == 1
    assert found["config"]["model_args"]["max_length"] == 48
    assert found["config"]["model"] == "bevatron"


def test_what_lm_eval_cannot_do_is_one_message(model: Path, tasks: Path, tmp_path: Path) -> None:
    def refused(message: str, *flags: object) -> None:
        with pytest.raises(BevatronError, match=message):
            app(["eval", *map(str, flags)], standalone_mode=False)

    refused("Tasks not found: absent", model / "native", "--tasks", "absent")
    refused("absent: ", tmp_path / "absent", "--tasks", "local_until", "--include_path", tasks)
    refused("--stride has no meaning with --tasks", model, "--tasks", "x", "--stride", "1")
    until = [model / "native", "--tasks", "local_until", "--include_path", tasks, "--gen_kwargs"]
    refused("generation with num_return_sequences", *until, "num_return_sequences=2")
    refused("up to 64 new tokens, the model's context has 64", *until, "max_gen_toks=64")
