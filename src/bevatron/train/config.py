"""The run configuration: what a YAML file may say, checked in full before anything starts."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bevatron.errors import BevatronError

Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Strict, frozen, and no unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True
    )


class ModelConfig(Section):
    """What to start from: weights (`init`), or random ones of a preset or spec file (`spec`)."""

    init: str | None = None
    spec: str | None = None

    @model_validator(mode="after")
    def _one(self) -> ModelConfig:
        if (self.init is None) == (self.spec is None):
            raise ValueError("give exactly one of init (weights) and spec (random weights)")
        return self


class ObjectiveConfig(Section):
    name: str = "pretrain"


class SourceConfig(Section):
    """A token store and its share of the mixture."""

    path: str
    weight: float = Field(1.0, gt=0)


class StageConfig(Section):
    """A mixture that takes over at a step. A store that was used before goes on where it was."""

    from_step: int = Field(ge=1)
    train: list[SourceConfig] = Field(min_length=1)


class DataConfig(Section):
    """`train` is the mixture from step 0 on, `stages` are the later ones; `validation` is read in
    order, so every run sees the same. `seq_len` is in tokens. `document_mask`: tokens of a sample
    see their own document alone. `allow_other_tokenizer`: the stores need not be made with the
    model's."""

    train: list[SourceConfig] = Field(min_length=1)
    stages: list[StageConfig] = []
    validation: list[SourceConfig] = []
    seq_len: int = Field(gt=0)
    document_mask: bool = False
    allow_other_tokenizer: bool = False

    @model_validator(mode="after")
    def _ascending(self) -> DataConfig:
        steps = [stage.from_step for stage in self.stages]
        if steps != sorted(set(steps)):
            raise ValueError(f"stages begin at steps {steps}, expected ascending ones")
        return self

    def sources(self) -> list[SourceConfig]:
        """All that are named anywhere."""
        later = [source for stage in self.stages for source in stage.train]
        return [*self.train, *later, *self.validation]


class ParallelConfig(Section):
    """Sizes of the mesh. `dp_shard` defaults to what is left of the processes; `split` is layers
    per pipeline stage, balanced by cost if absent."""

    tp: int = Field(1, ge=1)
    pp: int = Field(1, ge=1)
    dp_shard: int | None = Field(None, ge=1)
    dp_replicate: int = Field(1, ge=1)
    cp: int = Field(1, ge=1)
    sequence_parallel: bool = True
    schedule: str = "1f1b"
    split: list[int] | None = None


class TrainConfig(Section):
    """Batches are in samples of `data.seq_len` tokens."""

    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    micro_batch: int = Field(1, ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute: Literal["none", "full"] = "none"
    compile: bool = False
    seed: int = Field(0, ge=0)
    val_every: int = Field(0, ge=0)
    val_batches: int = Field(1, ge=1)


class OptimizerConfig(Section):
    name: Literal["adamw"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)  # YAML gives a list
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_grad: float = Field(1.0, ge=0)


class ScheduleConfig(Section):
    """Linear warmup over `warmup_steps`, then constant, or a cosine down to `min_lr`."""

    name: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    min_lr: float = Field(0.0, ge=0)


class CheckpointConfig(Section):
    """Save every so many steps (0: only at the end), keep the newest `keep`. `async` is accepted;
    checkpoints are written synchronously for now."""

    every: int = Field(0, ge=0)
    keep: int = Field(3, ge=1)
    async_: bool = Field(False, alias="async")


class FolderConfig(Section):
    dir: str


class RunConfig(Section):
    """The whole file."""

    model: ModelConfig
    tokenizer: str | None = None
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: FolderConfig

    @model_validator(mode="after")
    def _validation_has_data(self) -> RunConfig:
        if self.train.val_every and not self.data.validation:
            raise ValueError("train.val_every is set but data.validation is empty")
        return self


class _Loader(yaml.SafeLoader):
    """YAML with duplicate keys refused and `1e-4` read as the number that it is."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=deep)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise BevatronError(f"line {line}: the key {key!r} is not text; put it in quotes")
        if key in seen:
            raise BevatronError(f"line {line}: the key {key!r} appears twice; keep one of them")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
    lambda loader, node: _mapping(loader, node, deep=True),  # type: ignore[arg-type]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except BevatronError as error:
        raise BevatronError(f"{where}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise BevatronError(f"{where}: not valid YAML ({said})") from None


def load_config(path: Path, overrides: list[str]) -> RunConfig:
    """Read a run configuration and apply `section.key=value` overrides.

    Raises one BevatronError that lists every problem with its dotted path."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BevatronError(f"{path}: cannot be read as a run configuration ({reason})") from None
    raw = _parse(text, str(path))
    if not isinstance(raw, dict):
        raise BevatronError(f"{path}: expected sections such as `model:` and `train:`")
    problems: list[str] = []
    config = None
    for override in overrides:
        try:
            _apply(raw, override)
        except BevatronError as error:
            problems.append(str(error))
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        problems += [_explain(problem) for problem in error.errors()]
    if config is None or problems:
        shown = problems[0] if len(problems) == 1 else "\n  ".join(["", *problems]).lstrip(" ")
        raise BevatronError(f"{path}: {shown}")
    return config


def _apply(raw: dict[str, Any], override: str) -> None:
    dotted, equals, value = override.partition("=")
    if not equals or not dotted:
        raise BevatronError(f"override {override!r}: expected section.key=value")
    *parents, last = dotted.split(".")
    at: Any = raw
    for i, part in enumerate(parents):
        if isinstance(at, list):
            at = _item(at, part, override)
            continue
        if at.get(part) is None:
            at[part] = {}
        at = at[part]
        if not isinstance(at, (dict, list)):
            name = ".".join(parents[: i + 1])
            raise BevatronError(f"override {override!r}: {name} is a value, not a section")
    if isinstance(at, list):
        _item(at, last, override)
        at[int(last)] = _parse(value, f"override {override!r}")
    else:
        at[last] = _parse(value, f"override {override!r}")


def _item(items: list[Any], index: str, override: str) -> Any:
    if not index.isdigit() or int(index) >= len(items):
        raise BevatronError(f"override {override!r}: {index} is not one of {len(items)} items")
    return items[int(index)]


def _explain(problem: Any) -> str:
    """One line for one of pydantic's findings."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, name = problem["loc"]
        near = difflib.get_close_matches(str(name), _keys(parents), 1, 0.5)
        hint = f"; did you mean {'.'.join([*map(str, parents), near[0]])}?" if near else ""
        return f"{where}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{where}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    found = problem["input"]
    shown = f" (found {found!r})" if isinstance(found, (str, int, float, bool)) else ""
    return f"{where}: {message}{shown}" if where else message


def _keys(parents: list[Any]) -> list[str]:
    """The keys that the section at `parents` may have."""
    model: Any = RunConfig
    for part in parents:
        if isinstance(part, int):
            continue
        kind = model.model_fields[part].annotation
        arguments = [a for a in getattr(kind, "__args__", ()) if isinstance(a, type)]
        model = next((a for a in arguments if issubclass(a, BaseModel)), kind)
    return [field.alias or name for name, field in model.model_fields.items()]


def to_yaml(config: RunConfig) -> str:
    """The configuration with every default written out; `load_config` reads it back equal."""
    raw = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    return str(yaml.safe_dump(raw, sort_keys=False))


# Sections and keys whose change would change the numbers, or what a step is.
FIXED: tuple[str, ...] = ("objective", "optimizer", "schedule", "data.train", "data.seq_len")
FIXED += ("data.document_mask", "train.seed", "train.global_batch", "train.precision")
FIXED += ("data.stages",)


def changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys that differ and may not change between starts of one run."""
    before, after = _flat(old), _flat(new)
    keys = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    return [k for k in keys if any(k == f or k.startswith(f + ".") for f in FIXED)]


def _flat(config: RunConfig) -> dict[str, Any]:
    out: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)
        else:
            out[path] = value

    walk(config.model_dump(mode="json", by_alias=True), "")
    return out
