"""Reading and writing run configurations as YAML.

Reading is strict, takes overrides, and names every problem by its dotted path.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from bevatron.errors import BevatronError
from bevatron.train.config import RunConfig
from bevatron.train.config_objective import defaults, fields_of


class _Loader(yaml.SafeLoader):
    """YAML with duplicate keys refused and `1e-4` read as the number that it is."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=deep)
        line = key_node.start_mark.line + 1
        if type(key) is int:  # a layer's number
            key = str(key)
        if not isinstance(key, str):
            raise BevatronError(f"line {line}: the key {key!r} is not text; put it in quotes")
        if key in seen:
            raise BevatronError(f"line {line}: the key {key!r} appears twice; keep one of them")
        seen.add(key)
    found = yaml.SafeLoader.construct_mapping(loader, node, deep)
    return {str(key): value for key, value in found.items()}


_Loader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
    lambda loader, node: _mapping(loader, node, deep=True),  # type: ignore[arg-type]
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse(text: str, where: str) -> Any:
    """YAML as a run configuration is read. Raises BevatronError, which begins with `where`."""
    try:
        return yaml.load(text, _Loader)
    except BevatronError as error:
        raise BevatronError(f"{where}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise BevatronError(f"{where}: not valid YAML ({said})") from None


def load_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Read a run configuration and apply `section.key=value` overrides.

    Raises one BevatronError that lists every problem with its dotted path."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BevatronError(f"{path}: cannot be read as a run configuration ({reason})") from None
    raw = parse(text, str(path))
    if not isinstance(raw, dict):
        raise BevatronError(f"{path}: expected sections such as `model:` and `train:`")
    return checked(raw, overrides, str(path))


def checked(raw: dict[str, Any], overrides: Sequence[str], where: str) -> RunConfig:
    """The configuration that `raw` holds, with the overrides, which are applied to it in place.

    Raises one BevatronError, beginning with `where`, that lists every problem."""
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
        raise BevatronError(f"{where}: {shown}")
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
        at[int(last)] = parse(value, f"override {override!r}")
    else:
        at[last] = parse(value, f"override {override!r}")


def _item(items: list[Any], index: str, override: str) -> Any:
    if not index.isdigit() or int(index) >= len(items):
        raise BevatronError(f"override {override!r}: {index} is not one of {len(items)} items")
    return items[int(index)]


def _explain(problem: Any) -> str:
    """One line for one of pydantic's findings."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, name = problem["loc"]
        if name in _keys(parents):
            section = ".".join(map(str, parents))
            return f"{where}: not a key of the kind that {section} names; take it out"
        if len(parents) == 1 and name in _keys([]):
            return f"{where}: unknown key; did you mean {name}, which is a key of its own?"
        near = difflib.get_close_matches(str(name), _keys(parents), 1, 0.5)
        hint = f"; did you mean {'.'.join([*map(str, parents), near[0]])}?" if near else ""
        return f"{where}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{where}: missing, and there is no default; add it"
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
        kind = fields_of(model)[part].annotation
        inner = [get_args(a)[0] if get_origin(a) is Annotated else a for a in get_args(kind)]
        arguments = [a for a in inner if isinstance(a, type)]
        model = next((a for a in arguments if issubclass(a, BaseModel)), kind)
    return [field.alias or name for name, field in fields_of(model).items()]


def to_yaml(config: RunConfig, *, absent: bool = False) -> str:
    """The configuration with every default written out; `load_config` reads it back equal.

    Args:
        absent: also write keys whose value is null, and those of other objectives, which is the
            same as not to write them.
    """
    raw = config.model_dump(mode="json", by_alias=True, exclude_none=not absent)
    if absent:
        raw["objective"] = raw["objective"] | defaults() | raw["objective"]
    return str(yaml.safe_dump(raw, sort_keys=False))
