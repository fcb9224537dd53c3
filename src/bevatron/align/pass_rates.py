"""`bevatron pass-rates`: how often a model solves each problem of a run's configuration.

It samples answers with the engine as the run would, scores them with the run's rewards, and writes
every row with its pass rate: for a curriculum (`objective.problems.curriculum`), or to compare
checkpoints on held-out problems.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bevatron.align.problem_config import ProblemsConfig
from bevatron.align.problems import HELD_OUT, Problem, Problems
from bevatron.align.rewards import Answer, Rewards
from bevatron.align.rollout_kind import RolloutKind
from bevatron.align.rollouts import sampled
from bevatron.chat.answer_parts import marker_tokens
from bevatron.checkpoint.new_folder import replace_text
from bevatron.data.chat_examples import ChatExamples
from bevatron.errors import BevatronError
from bevatron.generate.engine import Engine
from bevatron.generate.request import Generation, Request
from bevatron.progress import progress
from bevatron.train.config import RunConfig
from bevatron.train.config_file import load_config

AT_ONCE = 16  # problems whose answers are asked for and scored together


def pass_rates(
    config_file: Path,
    overrides: list[str],
    out: Path | None,
    *,
    ckpt: str | None,
    samples: int,
    greedy: bool,
    validation: bool,
    limit: int | None,
    tp: int,
    dtype: str | None,
    device: str | None,
) -> dict[str, Any]:
    """Measure, write the rows (JSONL) to `out`, and return the summary.

    Args:
        ckpt: whose answers; the configuration's model.init if absent.
        validation: the held-out problems, rather than those to train on.
        limit: problems at most; if absent one pass.
    Raises BevatronError for a configuration that has no rewards, and what cannot be opened.
    """
    config = load_config(config_file, overrides)
    kind = config.objective
    if not isinstance(kind, RolloutKind) or not kind.rewards:
        raise BevatronError(
            f"{config_file}: objective {kind.name} has no rewards; pass rates are of problems that "
            "rewards score, as those of objective: {name: grpo, rewards: [...]}"
        )
    if kind.environment is not None:
        raise BevatronError(
            "objective.environment: answers of several turns are not measured; drop it with "
            "objective.environment=null to measure first answers"
        )
    model = ckpt or config.model.init
    if model is None:
        raise BevatronError("name a checkpoint: the configuration begins with random weights")
    problems = _problems(config, kind, validation)
    count = min(len(problems), limit or len(problems))
    if not count:
        part = "data.validation" if validation else "data.train"
        raise BevatronError(f"{config_file}: {part} names no problems")
    written: list[dict[str, Any]] = []
    began, tokens, finished = time.perf_counter(), 0, 0
    scores = []
    rewards = Rewards.open(kind.rewards)
    with rewards, Engine.open(
        model, tp=tp, dtype=dtype, device=device, max_batch=kind.answers_on.max_batch
    ) as engine, progress("pass rates", count, "problems") as advance:  # fmt: skip
        chats = ChatExamples.open(config.tokenizer or engine.opened.source or engine.opened.folder)
        for first in range(0, count, AT_ONCE):
            numbers = range(first, min(first + AT_ONCE, count))
            asked = [problems[i] for i in numbers]
            requests = [
                _request(kind, config, engine, chats, problem, number, sample, greedy)
                for number, problem in zip(numbers, asked, strict=True)
                for sample in range(samples)
            ]
            answers = engine.complete(requests)
            tokens += sum(len(answer.tokens) for answer in answers)
            finished += sum(answer.finish_reason == "stop" for answer in answers)
            found = rewards.score(
                [_answer(asked[i // samples], one) for i, one in enumerate(answers)]
            )
            scores.append(found)
            for note in rewards.notes():
                print(note, file=sys.stderr, flush=True)
            for i, problem in enumerate(asked):
                own = found[i * samples : (i + 1) * samples, 0]
                known = own[~np.isnan(own)]
                rate = float((known >= kind.solved_at).mean()) if len(known) else None
                written.append({**problem.row, "pass_rate": rate})
            advance(len(asked))
    if out is not None:
        lines = (json.dumps(row, ensure_ascii=False, default=str) for row in written)
        replace_text(out, "".join(f"{line}\n" for line in lines))
    return _summary(
        np.concatenate(scores), rewards.names, written, samples,
        {"finished": finished / (count * samples), "mean_length": tokens / (count * samples),
         "tokens_per_s": tokens / (time.perf_counter() - began)},
    )  # fmt: skip


def _problems(config: RunConfig, kind: RolloutKind, validation: bool) -> Problems:
    how = (kind.problems or ProblemsConfig()).model_copy(update={"curriculum": None})
    if validation:
        return Problems(config.data.validation, how, HELD_OUT, shuffled=False)
    return Problems(config.data.train, how, config.train.seed)


def _request(
    kind: RolloutKind,
    config: RunConfig,
    engine: Engine,
    chats: ChatExamples,
    problem: Problem,
    number: int,
    sample: int,
    greedy: bool,
) -> Request:
    ids = chats.prompt(problem.prompt)
    room = min(kind.max_completion_length, config.data.seq_len - len(ids))
    if room < 1:
        raise BevatronError(
            f"problem {number}: its prompt has {len(ids)} tokens, which leave no room for an "
            f"answer in data.seq_len {config.data.seq_len}; raise it"
        )
    drawn = sampled(kind, config.train.seed, number, sample)
    eos = chats.tokenizer.eos_id
    stops = engine.stop_tokens | ({eos} if eos is not None else set())
    return Request(
        tuple(ids),
        room,
        replace(drawn, temperature=0.0) if greedy else drawn,
        frozenset(stops),
        tuple(kind.stop_strings),
        kept_tokens=marker_tokens(chats.tokenizer.encoder),
    )


def _answer(problem: Problem, found: Generation) -> Answer:
    ended = found.finish_reason == "stop"
    return Answer(problem.row, problem.prompt, found.text, found.tokens, ended)


def _summary(
    scores: np.ndarray[Any, np.dtype[np.float64]],
    names: list[str],
    written: list[dict[str, Any]],
    samples: int,
    more: dict[str, float],
) -> dict[str, Any]:
    """`stderr`: of the mean over problems, which are drawn, not over answers."""
    rates = np.array([row["pass_rate"] for row in written if row["pass_rate"] is not None])
    spread = float(rates.std(ddof=1) / math.sqrt(len(rates))) if len(rates) > 1 else None
    return {
        "problems": len(written),
        "samples": samples,
        "pass_rate": float(rates.mean()) if len(rates) else None,
        "pass_rate_stderr": spread,
        "rewards": {
            name: float(np.nanmean(column)) if not np.isnan(column).all() else None
            for name, column in zip(names, scores.T, strict=True)
        },
        "unscorable": int(np.isnan(scores).any(1).sum()),
        **more,
    }
