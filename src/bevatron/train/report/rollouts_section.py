"""What a report shows of reinforcement learning: curves of rewards, and answers to read.

Everything that comes from a run is escaped here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from bevatron.charts.chart import Chart, Curve
from bevatron.charts.html_page import table
from bevatron.charts.thinning import smooth
from bevatron.train.report.run_reading import Record

ROLLOUTS = "rollouts"  # a run's folder of them: a file of JSON lines for each batch
_FILE = re.compile(r"step-(\d{8,})\.jsonl")
SHOWN = 8  # answers of a batch: the best half and the worst half
MOST = 2000  # characters of a text
LARGEST = 1 << 24  # bytes of a file that are looked at


def policy_charts(records: Sequence[Record]) -> list[Chart]:
    """Rewards, lengths, the distance to the reference, entropy, what engine and trainer differ by,
    and the step's time by its parts; of runs that have none of that, nothing."""
    if not any("reward" in r.series for r in records):
        return []
    one = len(records) == 1

    def of(key: str, label: str = "", *, mean: bool = False, dots: bool = False) -> list[Curve]:
        out = []
        for i, record in enumerate(records):
            if (series := record.series.get(key)) is not None:
                said = (label or key) if one else f"{record.name}{label and f', {label}'}"
                style = "dots" if dots else "line"
                smoothed = smooth(series) if mean else None
                out.append(Curve(said, i, series, style, mean=smoothed))  # type: ignore[arg-type]
        return out

    def several(keys: dict[str, str]) -> list[Curve]:
        """Curves of one run in colours of their own; of several runs the first key alone."""
        if not one:
            return of(next(iter(keys)))
        found = records[0].series
        names = [(key, label) for key, label in keys.items() if key in found]
        return [Curve(label, i, found[key]) for i, (key, label) in enumerate(names)]

    parts = sorted({k for r in records for k in r.series if re.fullmatch(r"rewards/.+/mean", k)})
    each = {key: key.split("/", 1)[1].rsplit("/", 1)[0] for key in parts}
    reward = of("reward", "reward", mean=True)
    if one and (held_out := records[0].series.get("val_reward")) is not None:
        reward.append(Curve("validation", 1, held_out, "dots"))
    passes = {k: k[4:] for r in records for k in r.series if k.startswith("val_pass@")}
    times = {f"time/{k}_s": k for k in ("rollout", "rewards", "logps", "update")}
    apart = "sampling/sampling_logp_difference"
    charts = [Chart("Reward", reward, wide=True, value="weighted sum of the rewards")]
    if len(each) > 1 and one:
        charts.append(Chart("Rewards", several(each), value="mean of each reward"))
    if passes:
        charts.append(Chart("Solved in validation", several(passes), from_zero=True, value="share"))
    lengths = {"completions/mean_length": "mean", "completions/max_length": "longest"}
    return [
        *charts,
        Chart("Length of answers", several(lengths), from_zero=True, value="tokens"),
        Chart("Cut off", of("completions/clipped_ratio"), from_zero=True, value="share of answers"),
        Chart("KL to the reference", of("kl"), from_zero=True, value="nats per token"),
        Chart("Entropy", of("entropy"), from_zero=True, value="nats per token"),
        Chart("Clipped ratios", of("clip_ratio/region_mean"), from_zero=True, value="share"),
        Chart(
            "Engine against trainer",
            several({f"{apart}/mean": "mean", f"{apart}/max": "largest"}),
            log=True,
            value="difference of log-probabilities",
        ),
        Chart("A step's time", several(times), unit=" s", from_zero=True, value="seconds"),
    ]


def rollouts(record: Record) -> str:
    """The best and the worst answers of the newest batches, each batch folded but the newest."""
    folder = record.path / ROLLOUTS
    found = sorted(p for p in folder.glob("step-*.jsonl") if _FILE.fullmatch(p.name))
    if not found:
        return ""
    chosen = dict.fromkeys([found[-1], found[len(found) // 2], found[0]])
    blocks = []
    for i, path in enumerate(chosen):
        lines = _read(path)
        if not lines:
            continue
        step = int(path.stem.partition("-")[2])
        ordered = sorted(lines, key=lambda line: -_value(line.get("reward")))
        half = SHOWN // 2
        shown = ordered if len(ordered) <= SHOWN else ordered[:half] + ordered[-half:]
        rows = [_row(line) for line in shown]
        heads = ["reward", "advantage", "tokens", "prompt", "answer", "rewards"]
        summary = f"step {step:,}: {len(shown)} of {len(lines):,} answers, the best first"
        body = table(heads, rows, numbers=0, only=True)
        opened = " open" if i == 0 else ""
        blocks.append(f"<details{opened}><summary>{summary}</summary>{body}</details>")
    return f"<section><h2>Rollouts</h2>{''.join(blocks)}</section>" if blocks else ""


def _read(path: Path) -> list[dict[str, Any]]:
    """What is no JSON object is passed over."""
    out = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file.read(LARGEST).splitlines():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                out.append(value)
    return out


def _row(line: dict[str, Any]) -> str:
    rewards = line.get("rewards")
    parts = rewards.items() if isinstance(rewards, dict) else ()
    said = ", ".join(f"{name} {_number(value)}" for name, value in parts)
    end = "" if line.get("finished") else " [cut off]"
    return (
        f'<td class="n">{_number(line.get("reward"))}</td>'
        f"<td>{_number(line.get('advantage'))}</td><td>{_number(line.get('tokens'))}</td>"
        f"<td>{escape(_prompt(line.get('prompt')))}</td>"
        f"<td>{escape(_cut(str(line.get('answer', ''))) + end)}</td><td>{escape(said)}</td>"
    )


def _prompt(value: Any) -> str:
    """A text, or the last message of several."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content", "")
    return _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= MOST else f"{text[:MOST]} ..."


def _value(value: Any) -> float:
    return float(value) if type(value) in (int, float) else float("-inf")


def _number(value: Any) -> str:
    if type(value) not in (int, float):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
