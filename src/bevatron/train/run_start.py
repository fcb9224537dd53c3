"""Starting a run from its own newest good step, from other weights, or from random ones."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bevatron.bridge.open_weights import Opened, base_of, open_step, open_weights
from bevatron.checkpoint.manifest import FILE_NAME, NewerFormatError, read_manifest
from bevatron.checkpoint.run_folder import (
    LATEST,
    RunFolder,
    check_whole,
    is_damage,
    read_state,
    step_of,
)
from bevatron.checkpoint.save_and_load import verify_share
from bevatron.data.tokenizer import open_tokenizer
from bevatron.errors import BevatronError, CheckpointError, failure
from bevatron.families import for_spec
from bevatron.families.published_models import family_of, preset
from bevatron.parallel.on_all_ranks import on_all
from bevatron.spec import ModelSpec, SpecError
from bevatron.spec.adapter import NAMES
from bevatron.spec.json import from_json
from bevatron.train.adapter_config import adapted
from bevatron.train.adapter_init import adapter_source
from bevatron.train.config import RunConfig
from bevatron.train.config_file import load_config
from bevatron.train.head_kinds import with_head
from bevatron.train.model_override import overridden
from bevatron.train.nanochat_depth import DepthConfig

Say = Callable[[str], None]
FOREIGN_SHOWN = 3  # names of files that are not a run's
SEEN_WITHIN_S = 60.0  # how long a network file system may hide a new file from other machines


@dataclass(frozen=True)
class Start:
    """What a run starts from: a step of its own folder, other weights, or nothing (random).

    Attributes:
        fresh: parameters that the weights do not have: of a new head, of a new adapter.
        state: of the resumed step, its train_state.json.
        config: of the resumed step, the configuration that it was saved under.
        branched: whether that is a step of another run (`run.branch_from`).
        verified: whether the hashes of `weights` have been checked.
        damaged: newer steps that were set aside, and what is wrong with each.
    """

    spec: ModelSpec
    weights: Opened | None
    resumed: Path | None
    family: str
    fresh: tuple[str, ...] = ()
    state: dict[str, Any] | None = None
    config: RunConfig | None = None
    branched: bool = False
    verified: bool = False
    damaged: tuple[str, ...] = ()


def find_start(config: RunConfig) -> Start:
    """Where a run would start, from a look that checks no hashes and changes nothing. A complete
    step in the run folder wins over `model.init`. The model has the head that the objective needs.
    """
    folders = RunFolder(Path(config.run.dir)).step_folders()
    failure: BevatronError | None = None
    for folder in reversed(folders):
        try:
            opened = open_step(folder)
        except BevatronError as error:  # the run itself says what it is and goes on before it
            if not is_damage(error):
                raise
            failure = failure or error
        else:
            return _headed(config, Start(opened.spec, opened, folder, opened.manifest.family))
    if failure is not None:
        raise failure
    if (branch := branch_step(config)) is not None:
        opened = open_step(branch)
        start = Start(opened.spec, opened, branch, opened.manifest.family, branched=True)
        return _headed(config, start)
    return _fresh(config)


def branch_step(config: RunConfig) -> Path | None:
    """The step that `run.branch_from` names, if it does. Raises BevatronError if it is not there,
    or if there would be no step to take after it."""
    branch = config.run.branch_from
    if branch is None:
        return None
    path = Path(branch.run)
    if path.resolve() == Path(config.run.dir).resolve():
        raise BevatronError(f"run.branch_from: {path} is run.dir itself; name a new run.dir")
    if not path.exists():
        raise BevatronError(f"run.branch_from: {path} does not exist; name the folder of a run")
    steps = {step_of(folder): folder for folder in RunFolder(path).step_folders()}
    step = branch.step if branch.step is not None else max(steps, default=None)
    if step is None or step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        wanted = "a step" if step is None else f"step {step}"
        raise BevatronError(f"run.branch_from: {path} has not {wanted}; its steps are: {there}")
    if step >= config.train.steps:
        raise BevatronError(
            f"run.branch_from: {steps[step]} has taken {step} steps, and train.steps is "
            f"{config.train.steps}; raise train.steps, which counts from the other run's beginning"
        )
    return steps[step]


def _fresh(config: RunConfig, copies: bool = True) -> Start:
    """The start of a run without a step of its own. `copies`: as in `open_weights`."""
    if config.model.init is not None:
        opened = open_weights(config.model.init, copies=copies)
        where = f"model.init: {config.model.init}"
        check_like(where, "model.like", config.model.like, opened.spec)
        return _headed(config, Start(opened.spec, opened, None, opened.manifest.family), copies)
    given = config.model.spec
    spec = given.model if isinstance(given, DepthConfig) else spec_named(str(given))
    changes = {"std": config.model.init_std, "depth_scaled": config.model.depth_scaled}
    drawn = {name: value for name, value in changes.items() if value is not None}
    spec = replace(spec, init=replace(spec.init, **drawn))  # type: ignore[arg-type]
    named = isinstance(given, str) and not Path(given).is_file()
    family = family_of(str(given)) if named else for_spec(spec)
    return _headed(config, Start(spec, None, None, family.name))


def _headed(config: RunConfig, start: Start, copies: bool = True) -> Start:
    """The same with the head that the objective needs, what the run changes of the model, and its
    adapter. `copies`: as in `open_weights`."""
    start = _overridden(config, start)
    objective, resumed = config.objective, start.resumed is not None

    def pad() -> int | None:
        tokenizer = open_tokenizer(tokenizer_of(config, start))
        return tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id

    spec, fresh = with_head(start.spec, objective, start.family, pad, keep=resumed)
    if fresh and resumed:
        raise BevatronError(
            f"objective.name {objective.name} needs a new head, which {start.resumed} has no "
            "optimizer state for; begin with its weights alone (model.init) in another run.dir"
        )
    return _with_adapter(config, replace(start, spec=spec, fresh=fresh), copies)


def _with_adapter(config: RunConfig, start: Start, copies: bool) -> Start:
    """The same with the run's adapter: a new one, or that of the step together with the base that
    it belongs to. Raises BevatronError if the run has another one than the step."""
    settings, old = config.adapter, start.spec.adapter
    if start.resumed is None:
        if settings is None:
            return start
        spec = adapted(start.spec, settings, start.fresh)
        made = tuple(p.name for p in spec.parameters() if p.role in NAMES)
        if settings.init is not None:
            adapter_source(settings.init, spec, start.family, start.weights)
        return replace(start, spec=spec, fresh=(*start.fresh, *made))
    if settings is None and old is None:
        return start
    if settings is None or old is None:
        has, wants = ("an adapter", "none") if settings is None else ("no adapter", "one")
        raise BevatronError(
            f"adapter: {start.resumed} has {has}, and the configuration {wants}; go on as the run "
            "began, or begin with its weights (model.init, which merges an adapter into its base) "
            "in another run.dir"
        )
    head = [name for name in old.whole if name.startswith("head.")]
    spec = adapted(start.spec.base, settings, head)
    shapes = [
        {p.name: p.shape for p in s.parameters() if s.adapter and s.adapter.owns(p.name)}
        for s in (start.spec, spec)
    ]
    if shapes[0] != shapes[1]:
        raise BevatronError(
            f"adapter: the one in {start.resumed} has other parameters (its rank, targets, layers, "
            "kind, fused and whole are those of its start); use the old values, or another run.dir"
        )
    assert start.weights is not None
    base = base_of(start.weights, config.model.init, copies=copies)
    return replace(start, spec=spec, weights=replace(start.weights, base=base))


def _overridden(config: RunConfig, start: Start) -> Start:
    """The same with `model.override`, which a step that was saved under it has already."""
    override = config.model.override
    if override is not None and start.resumed is not None:
        before = start.config or load_config(start.resumed / "config.yaml", [])
        override = override if override != before.model.override else None
    if override is None:
        return start
    return replace(start, spec=overridden(start.spec, override, start.family))


def tokenizer_of(config: RunConfig, start: Start) -> str | Path:
    """The configured tokenizer, or the one that lies with the weights."""
    if config.tokenizer is not None:
        return config.tokenizer
    if start.weights is None or start.weights.source is None:
        raise BevatronError("tokenizer: missing; the model comes without one, so name its folder")
    return start.weights.source


@contextmanager
def opened_run(config: RunConfig, say: Say) -> Iterator[Start]:
    """Hold the run's folder against other runs, and say where this one starts. Collective.

    The newest step whose every byte is as it was written is continued from. Newer ones that are
    damaged are renamed to `damaged-...`, loudly. Raises BevatronError if the folder is in use, if
    the ranks do not share it, or if it holds steps of which none is good."""
    folder = RunFolder(Path(config.run.dir))
    main = dist.get_rank() == 0
    with ExitStack() as stack:
        on_all(lambda: stack.enter_context(folder.occupied()) if main else None)
        _check_shared(folder.path)
        start = _newest_good(folder, say)
        if start is None and main and (names := folder.foreign()):
            more = ", ..." if len(names) > FOREIGN_SHOWN else ""
            say(
                f"warning: run.dir {folder.path} holds what is no run's "
                f"({', '.join(names[:FOREIGN_SHOWN])}{more}); steps and metrics go beside it"
            )
        found: list[Start] = []
        if start is None:
            start = _branched(config)
        on_all(
            lambda: found.append(_headed(config, start, main) if start else _fresh(config, main))
        )
        yield found[0]


def _check_shared(folder: Path) -> None:
    """Every rank must see what the others write: the one that commits a step looks for all files,
    and a rank that continues reads what any of them wrote."""
    main = dist.get_rank() == 0
    probe = folder / f".seen-{on_all(secrets.token_hex)[0]}"

    def look() -> None:
        deadline = time.monotonic() + SEEN_WITHIN_S
        while not probe.exists():
            if time.monotonic() > deadline:
                raise BevatronError(
                    f"{folder}: rank {dist.get_rank()} does not see what rank 0 wrote there; "
                    "run.dir must be on a file system that all machines share"
                )
            time.sleep(0.1)

    try:
        on_all(lambda: probe.touch() if main else None)
        on_all(look)
    finally:
        if main:
            probe.unlink(missing_ok=True)


def _newest_good(folder: RunFolder, say: Say) -> Start | None:
    """The newest step that is whole; None if there are no steps at all."""
    main = dist.get_rank() == 0
    paths = on_all(lambda: list(reversed(folder.folders())) if main else [])[0]
    problems: dict[Path, str] = {}
    for path in paths:
        start, problem = _examined(path)
        if start is None:
            problems[path] = problem
            say(f"warning: {path.name} is damaged: {problem}")
            continue
        aside = on_all(partial(_settle, folder, path, problems if main else None))[0]
        for bad, now in zip(problems, aside, strict=True):
            say(f"warning: continuing from {path.name} instead of {bad.name}, now {now.name}")
        damaged = tuple(f"{bad.name}: {problem}" for bad, problem in problems.items())
        return replace(start, damaged=damaged)
    if problems:
        found = "; ".join(problems.values())
        raise BevatronError(
            f"{folder.path}: none of its steps can be continued from ({found}); restore one, or "
            "name another run.dir"
        )
    return None


def _branched(config: RunConfig) -> Start | None:
    """The step of another run that this one begins as, checked in full, which changes nothing
    there. Collective."""
    path = on_all(lambda: branch_step(config))[0]
    if path is None:
        return None
    start, problem = _examined(path)
    if start is None:
        raise BevatronError(
            f"run.branch_from: {path} is damaged: {problem}; name another step of that run"
        )
    return replace(start, branched=True)


def _settle(folder: RunFolder, good: Path, damaged: Iterable[Path] | None) -> list[Path]:
    """Make `good` the latest step and set the damaged ones aside: where they are now. Ranks other
    than the first pass None."""
    if damaged is None:
        return []
    latest = folder.path / LATEST
    if not latest.is_file() or latest.read_bytes() != f"{good.name}\n".encode():
        folder.point(good)
    return [folder.set_aside(path) for path in damaged]


def _examined(path: Path) -> tuple[Start | None, str]:
    """A step as a start if it is whole, else what is wrong with it. Collective; rank 0 looks at
    the small files, all share the tensors' bytes."""
    found: list[Start] = []
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def small() -> str | None:
        return _damage(lambda: _check_small(path)) if rank == 0 else None

    def share() -> str | None:
        def check() -> None:
            opened = open_step(path)
            verify_share(path, opened.manifest, rank, ranks)
            state = read_state(path, opened.manifest.step)
            config = load_config(path / "config.yaml", [])
            family = opened.manifest.family
            start = Start(opened.spec, opened, path, family, state=state, config=config)
            found.append(replace(start, verified=True))

        return _damage(check)

    for look in (small, share):
        if problems := [problem for problem in on_all(look) if problem]:
            return None, problems[0]
    return found[0], ""


def _check_small(path: Path) -> None:
    if not (path / FILE_NAME).is_file():
        raise CheckpointError(f"{path}: has no {FILE_NAME}")
    manifest = read_manifest(path)
    check_whole(path, manifest)
    open_step(path)
    try:
        load_config(path / "config.yaml", [])
    except BevatronError as error:
        if "config.yaml" in manifest.extra.get("files", {}):  # it is as it was written
            raise NewerFormatError(f"{error}; continue with the version that saved it") from error
        raise


def _damage(check: Callable[[], None]) -> str | None:
    """What `check` finds damaged, if anything. Raises what it raises for another reason."""
    try:
        check()
    except (BevatronError, OSError) as error:
        if not is_damage(error):
            raise
        return str(failure(error))
    return None


def check_like(where: str, like_key: str, like: str | None, spec: ModelSpec) -> None:
    """Refuse weights, named by `where`, that are not of the sizes that `like_key` says."""
    wanted = {p.name: p.shape for p in (spec_named(like) if like else spec).parameters()}
    found = {p.name: p.shape for p in spec.parameters()}
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            is_, expected = (str(list(x.get(name, ())) or "absent") for x in (found, wanted))
            raise BevatronError(
                f"{where} is not of the sizes of {like}, which {like_key} names: its {name} is "
                f"{is_}, expected {expected}; name other weights, or set {like_key}=null"
            )


def spec_named(name: str) -> ModelSpec:
    """A spec from a JSON file, or a preset by its name."""
    path = Path(name)
    if path.is_file():
        try:
            return from_json(path.read_text(encoding="utf-8"))
        except SpecError as error:
            raise SpecError(f"{name}: {str(error).removeprefix('spec.json: ')}") from error
    if path.suffix == ".json":
        raise BevatronError(f"model.spec: {name} does not exist")
    return preset(name)
