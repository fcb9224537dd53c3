"""What a restart may change: for every key of the configuration, what a change does to numbers.

A run that continues gives the same numbers, bit for bit, as without the restart; or its start says
in one line what each change does; or the start is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bevatron.data.tokenizer import TOKENIZER
from bevatron.errors import BevatronError
from bevatron.train.config import RunConfig, SourceConfig, flat
from bevatron.train.config_objective import TOKENS, defaults
from bevatron.train.freezing import frozen_parameters
from bevatron.train.optimizer_and_schedule import learning_rate
from bevatron.train.run_start import Start

# nothing: no number depends on it. rounding: sums are added up otherwise. aside: the steps' numbers
# stay, something else is said. free: the numbers move, and they may. fixed: they move, and may not
# unless that is asked for. origin: what the run began from, which is not read again.
Kind = Literal["nothing", "rounding", "aside", "free", "fixed", "origin"]


class Effect(NamedTuple):
    """Of a change of one key. `what` goes on after `key old -> new: `."""

    kind: Kind
    what: str = ""


_NOTHING = Effect("nothing")
_ROUNDING = Effect("rounding")
_ORIGIN = Effect("origin")
_UPDATES = Effect("fixed", "updates are made otherwise from here on")
_TROUBLE = Effect("aside", "acts when there is trouble; all other steps have the same numbers")
_RATE = Effect("fixed", "learning rate")  # what that means is computed
# By key, or by section for all that it has. Every key has one (a test sees to it).
EFFECTS: Mapping[str, Effect] = {
    "recipe": _NOTHING,
    "prune": _NOTHING,
    "model": _ORIGIN,
    "model.override": Effect("fixed", "the model's rope or context is another from here on"),
    "adapter": Effect("fixed", "the adapter counts otherwise from here on"),
    "adapter.init": _ORIGIN,
    "tokenizer": _ORIGIN,
    "objective": Effect("fixed", "another loss is minimised from here on"),
    "objective.teacher_like": _NOTHING,
    "objective.reference_like": _NOTHING,
    "objective.precompute_reference": _ROUNDING,
    "objective.engine": _ROUNDING,
    "objective.num_generations_eval": Effect("aside", "validations ask so often from here on"),
    "objective.solved_at": Effect("aside", "validations count as solved what reaches that"),
    "objective.max_logp_difference": _TROUBLE,
    "data.train": Effect("fixed", "samples are of another mixture from here on"),
    "data.stages": Effect("fixed", "samples are of other mixtures from the stages that differ on"),
    "data.validation": Effect("aside", "validation losses are of other data from here on"),
    "data.seq_len": Effect(
        "fixed", "samples are cut otherwise, so some text comes again and some is passed over"
    ),
    "data.document_mask": Effect("fixed", "tokens see other tokens from here on"),
    "data.allow_other_tokenizer": _NOTHING,
    "parallel": _ROUNDING,
    "train.freeze": Effect("fixed", "other parameters are trained from here on"),
    "train.steps": Effect("free", "learning rate"),
    "train.global_batch": Effect("fixed", "gradients are of so many samples from here on"),
    "train.micro_batch": _ROUNDING,
    "train.precision": Effect("fixed", "computes so from here on"),
    "train.recompute": _ROUNDING,
    "train.compile": _ROUNDING,
    "train.device": _ROUNDING,
    "train.seed": Effect(
        "fixed", "samples come in another order, so some come again and some are passed over"
    ),
    "train.val_every": _NOTHING,
    "train.val_batches": Effect("aside", "validation losses are of so many samples from here on"),
    "optimizer": _UPDATES,
    "optimizer.lr": _RATE,
    "optimizer.clip_grad": Effect("fixed", "gradients are clipped there from here on"),
    "schedule": _RATE,
    "checkpoint": _NOTHING,
    "safety": _TROUBLE,
    "safety.hang_timeout_s": _NOTHING,
    "safety.check_replicas_every": _NOTHING,
    "safety.replay_every": _NOTHING,
    "log": _NOTHING,
    "run": _NOTHING,
    "run.branch_from": _ORIGIN,
}
SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Change:
    """One key, or what stands behind it, that differs from how the step was saved.

    Attributes:
        key: its dotted name; `kind`: what the change is, see `Kind`.
        said: a line about it; empty if there is nothing to say.
    """

    key: str
    kind: Kind
    said: str = ""


def effect_of(key: str) -> Effect:
    """That of the longest entry of EFFECTS which is the key or a section around it. (One without
    any may not change: a test sees to it that there is none.)"""
    parts = key.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((EFFECTS[name] for name in names if name in EFFECTS), Effect("fixed", "unknown"))


def compare(start: Start, config: RunConfig, hash_of: Callable[[str], str]) -> list[Change]:
    """What differs between the configuration of the step that is continued from and this one, in
    what it means: data and models count by their content, rates by their values.

    Args:
        hash_of: of a data source, by its path.
    """
    assert start.config is not None and start.state is not None
    old, step = start.config, int(start.state["step"])
    keys = _differing(old, config)
    recorded = start.state.get("data", {})
    recorded = recorded | start.state.get("validation", {})
    same = _same_data(old, config, partial(_recorded, recorded, hash_of, _paths(old)))
    same |= {f"objective.{name}" for name in start.state.get("companions", {})}  # see `Run`
    rates = [key for key in keys if effect_of(key).what == "learning rate"]
    rate = _rates(old, config, step) if rates else ""
    uses_muon = "muon" in (old.optimizer.name, config.optimizer.name)
    out = []
    for key in keys:
        kind, what = effect_of(key)
        if key in same:
            gone = key.startswith("objective.") and None in (_at(old, key), _at(config, key))
            if not gone:
                continue
        if key == "checkpoint.every" and config.safety.rewinds:
            kind, what = (
                "aside",
                "a rewind goes back to such a step; all others have the same numbers",
            )
        if key == "train.freeze" and not _freeze(start, config):
            continue  # the same parameters in other words
        if key in rates:
            if not rate:
                continue
            what = rate
        if key.startswith("model.override") and _at(config, key) is None:
            continue  # the step's model has it already
        if key.startswith("optimizer.muon.") and not uses_muon:
            continue
        if kind == "origin":
            out += _origin(start, config, key)
            continue
        said = f"{key} {_change(old, config, key)}: {_more(start, config, key, what)}"
        out.append(Change(key, kind, "" if kind in ("nothing", "rounding") else said))
    return [change for change in out if change.kind != "nothing"]


def refuse(where: str, changes: Iterable[Change], allowed: bool | Collection[str]) -> None:
    """Raise BevatronError that names what changed and may not, unless that is allowed: all of it,
    or keys and sections by their names."""
    keys = [c.key for c in changes if c.kind == "fixed" and not allows(allowed, c.key)]
    if keys:
        raise BevatronError(
            f"{where}: this run was started with other values of {', '.join(keys)}; use the old "
            f"ones, another run.dir (run.branch_from goes on from a step in it), or "
            f"--allow-changed={','.join(keys)}"
        )


def allows(allowed: bool | Collection[str], key: str) -> bool:
    """Whether a change of this key was asked for, by its name, its section's, or altogether."""
    if isinstance(allowed, bool):
        return allowed
    return any(key == name or key.startswith(name + ".") for name in allowed)


def lines(
    changes: Iterable[Change], made: Iterable[str], old: RunConfig, new: RunConfig
) -> list[str]:
    """What the start says of all that changed.

    Args:
        made: what differs in what the processes are made of, such as their layout."""
    changes = list(changes)
    out = [change.said for change in changes if change.said]
    rounded = list(made)
    layout = any(text.startswith("layout ") for text in rounded)  # says what parallel.* amounts to
    for change in changes:
        if change.kind == "rounding" and not (layout and change.key.startswith("parallel.")):
            rounded.append(f"{change.key} {_change(old, new, change.key)}")
    if rounded:
        out.append(f"{', '.join(rounded)}: the same numbers up to rounding")
    elif all(change.kind not in ("free", "fixed") for change in changes):
        out.append("as it was saved: bit for bit the same numbers")
    return out


def as_it_began(start: Start, config: RunConfig) -> RunConfig:
    """The configuration with what the run really began from, which a step that it saves claims."""
    if start.config is None:
        return config
    began, now = start.config.model, config.model.override
    branch = start.config.run.branch_from
    if start.branched and config.run.branch_from is not None and start.state is not None:
        branch = config.run.branch_from.model_copy(update={"step": start.state["step"]})
    old: dict[str, Any] = {
        "model": began.model_copy(update={"override": now or began.override}),
        "run": config.run.model_copy(update={"branch_from": branch}),
    }
    if _keeps_tokenizer(start, config):
        old["tokenizer"] = start.config.tokenizer
    return config.model_copy(update=old)


def _differing(old: RunConfig, new: RunConfig) -> list[str]:
    before, after = flat(old), flat(new)
    if old.objective.name != new.objective.name:  # keys that one of them has not
        others = {f"objective.{key}": value for key, value in defaults().items()}
        before, after = others | before, others | after
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


def _at(config: RunConfig, key: str) -> Any:
    return flat(config).get(key)


def _change(old: RunConfig, new: RunConfig, key: str) -> str:
    """`old -> new`, if that is short enough to read."""
    text = f"{_at(old, key)} -> {_at(new, key)}"
    return text if len(text) <= SHOWN else "changed"


def _more(start: Start, config: RunConfig, key: str, what: str) -> str:
    """What the effect of a change is, where that depends on the step."""
    assert start.state is not None and start.config is not None
    if key == "train.global_batch":
        return f"{what}; the data goes on at sample {start.state['samples']:,}"
    if key == "train.freeze":
        return _freeze(start, config)
    if key == "train.precision" and start.config.train.precision == "bf16":
        return f"{what}, from the step's fp32 masters"
    return what


def _freeze(start: Start, config: RunConfig) -> str:
    """What becomes of the parameters that only one of the lists names."""
    assert start.config is not None
    before, after = (frozen_parameters(start.spec, c.train.freeze) for c in (start.config, config))
    held, moved = len(after - before), len(before - after)
    rounded = " as they are rounded to bf16," if config.train.precision == "bf16" else ""
    said = [f"{held} more tensors are held still from here on,{rounded} and lose their moments"]
    said = said if held else []
    if moved:
        said.append(f"{moved} are trained from here on, with moments as before their first update")
    return "; ".join(said)


def _origin(start: Start, config: RunConfig, key: str) -> list[Change]:
    """A model or tokenizer that is named and not read, because the run has its own."""
    assert start.config is not None and start.resumed is not None
    given = _at(config, key)
    if key.startswith("run.") and start.branched:
        return []
    if key == "tokenizer" and not _keeps_tokenizer(start, config):
        return []
    if given is None:  # the other of init and spec says it
        return []
    base = start.weights.base if start.weights is not None else None
    if key == "model.init" and base is not None and Path(given).resolve() == base.folder.resolve():
        return []  # the base of the adapter, which lies there now
    before = _at(start.config, key)
    if key.startswith("model."):
        before = before or start.config.model.init or start.config.model.spec
    began = f" (which began with {before})" if before is not None else ""
    step = start.resumed if start.branched else start.resumed.name
    return [Change(key, "origin", f"{key} {given} is not read: the run goes on from {step}{began}")]


def _keeps_tokenizer(start: Start, config: RunConfig) -> bool:
    """Whether the steps of a run go on with the tokenizer that lies in them. (Labelled examples are
    read with the configured one, which must be the same.)"""
    if config.objective.reads != TOKENS or start.weights is None:
        return False
    source = start.weights.source
    return source is not None and (source / TOKENIZER).is_file()


# --- rates ----------------------------------------------------------------------------------------


def _rates(old: RunConfig, new: RunConfig, step: int) -> str:
    """What another schedule, highest rate or number of steps does to the learning rate after
    `step`; empty if a run of the new configuration from the beginning would have had the same
    rates until now, and one of the old configuration would go on with the same."""

    def rate(config: RunConfig, number: int) -> float:
        steps, lr = config.train.steps, config.optimizer.lr
        return learning_rate(number, config.schedule, steps=steps, lr=lr)

    shared = range(step + 1, min(old.train.steps, new.train.steps) + 1)
    moved = next((n for n in shared if rate(old, n) != rate(new, n)), None)
    if all(rate(old, n) == rate(new, n) for n in range(1, step + 1)):
        if moved is None:
            return ""
        return (
            f"the learning rate goes on as in a run of the new values from the beginning (step "
            f"{moved} has {rate(new, moved):.4g}, would have had {rate(old, moved):.4g})"
        )
    if moved is None and shared:
        return "the learning rate goes on as before"
    had = rate(old, step)
    if all(rate(new, n) == had for n in range(step + 1, new.train.steps + 1)):
        none = ", so the steps from here on change no weights" if had == 0 else ""
        return f"the learning rate stays at {had:.4g}, which step {step} had{none}"
    at = moved or step + 1
    before = f", would have had {rate(old, at):.4g}" if moved else ""
    return (
        f"the learning rate is another from step {at} on: {rate(new, at):.4g}{before} (step {step} "
        f"had {had:.4g})"
    )


# --- data by its content --------------------------------------------------------------------------


def _paths(config: RunConfig) -> set[str]:
    return {source.path for source in config.data.sources()}


def _recorded(
    recorded: Mapping[str, str], hash_of: Callable[[str], str], before: Collection[str], path: str
) -> str:
    """A source's hash as the step recorded it, or else as it is. (`ReadAhead.changed_sources` sees
    to those that changed where they lie.)"""
    return recorded.get(path) or (f"path {path}" if path in before else hash_of(path))


def _same_data(old: RunConfig, new: RunConfig, hash_of: Callable[[str], str]) -> set[str]:
    """Which of the data's keys say the same in other words: paths whose content is the same."""

    def told(config: RunConfig) -> dict[str, Any]:
        numbers: dict[str, int] = {}  # a store that is named again goes on where it was

        def mixture(sources: Iterable[SourceConfig]) -> list[tuple[int, str, str | None, float]]:
            return [
                (numbers.setdefault(s.path, len(numbers)), hash_of(s.path), s.split, s.weight)
                for s in sources
            ]

        data = config.data
        train = mixture(data.train)
        stages = [(stage.from_step, mixture(stage.train)) for stage in data.stages]
        numbers.clear()
        validation = mixture(data.validation)
        return {"data.train": train, "data.stages": stages, "data.validation": validation}

    before, after = told(old), told(new)
    return {key for key in before if before[key] == after[key]}
