"""Running tasks of lm-evaluation-harness through its own command line."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from bevatron.errors import BevatronError


def run_tasks(
    ckpt: str,
    tasks: str,
    model: Mapping[str, Any],
    flags: Sequence[str],
    *,
    device: str | None = None,
    as_json: bool = False,
) -> None:
    """What `lm_eval --model bevatron --tasks TASKS FLAGS` would do, if lm_eval had a way to find
    models of others: print its table, and with `as_json` its results as one object instead.

    Args:
        model: further arguments of `BevatronLM`; a None is left out.
        flags: of lm_eval, as they are.
        device: what is here, if absent; lm_eval's own default is cuda:0 wherever it runs.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise BevatronError(
            "--tasks needs lm-evaluation-harness; install it: pip install 'bevatron[eval]'"
        ) from error
    from bevatron.evaluate import lm_eval_model  # noqa: F401  (it registers the model)
    from bevatron.parallel.process_groups import default_device

    # As JSON, because lm_eval would take a path with a comma or an equals sign apart
    arguments = {"pretrained": ckpt, **{k: v for k, v in model.items() if v is not None}}
    line = ["lm_eval", "run", "--model", "bevatron", "--model_args", json.dumps(arguments)]
    line += ["--tasks", tasks, "--device", device or str(default_device()), *flags]
    if not as_json:
        _run(cli_evaluate, line)
        return
    if any(flag.partition("=")[0] in ("--output_path", "-o") for flag in flags):
        raise BevatronError("--json prints what --output_path would write; leave one of them out")
    with tempfile.TemporaryDirectory(prefix="bevatron-eval-") as folder:
        with redirect_stdout(sys.stderr):
            _run(cli_evaluate, [*line, "--output_path", folder])
        [written] = Path(folder).rglob("results_*.json")
        print(json.dumps(json.loads(written.read_text(encoding="utf-8"))))


def _run(cli_evaluate: Any, line: list[str]) -> None:
    before, sys.argv = sys.argv, line
    try:
        cli_evaluate()
    except BevatronError:
        raise
    except Exception as error:  # lm_eval and its tasks raise anything
        first = (str(error).strip().splitlines() or [""])[0]
        raise BevatronError(f"lm_eval: {type(error).__name__}: {first}") from error
    finally:
        sys.argv = before
