"""Reading and writing rope in config.json, which has two spellings and five kinds of rope.

Files up to transformers 4 have `rope_theta` and `rope_scaling`. Version 5 writes one dict,
`rope_parameters`, and reads both spellings. If version 4 finds only the new spelling, it computes
with theta 10000 and no scaling, and gives no warning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bevatron.families.config_fields import Field, Values, check, flag, shown, size, wrong
from bevatron.families.registry import Config, FamilyError
from bevatron.spec.rope import ROPE_NEEDS, Rope

ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")

_CONTEXT = "original_max_position_embeddings"
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_YARN = ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
_KEYS = (
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "low_freq_factor"),
    *("high_freq_factor", _CONTEXT, *_YARN, "truncate"),
)
_POSITIVE = Field("number", None)
_WHY_NOT = {
    "longrope": "transformers 4 and 5 compute different angles for it, so none would be right",
    "su": "it is an old name of longrope, of which transformers 4 and 5 differ",
}


def read_rope(config: Config, max_positions: int, partial: float | None = None) -> Rope:
    """The rope of a config.json in the old or the new spelling, as transformers 5.23 reads it.

    A non-empty `rope_scaling` wins over `rope_parameters`; within the dict, `rope_theta` and
    `partial_rotary_factor` win over those next to it; then come theta 10000 and `partial`, the
    family's default. Without `partial` the family rotates whole heads, and a config that asks
    otherwise is refused: transformers 4 cannot run it and 5 ignores it.
    """
    place = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    found = config.get(place)
    given = {} if found is None else found
    if not isinstance(given, Mapping):
        raise wrong(place, found, "an object or null")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_NEEDS:
        why = _WHY_NOT.get(kind, "") if isinstance(kind, str) else ""
        raise FamilyError(
            f"config.json: {place}.rope_type is {shown(kind)}; supported are "
            f"{', '.join(ROPE_NEEDS)}" + (f" ({why})" if why else "")
        )
    for key, value in given.items():
        if key not in _KEYS and value is not None:
            raise FamilyError(
                f"config.json: {place}.{key} = {shown(value)} is not understood and may change "
                f"the positions; known are {', '.join(_KEYS)}"
            )

    def number(name: str, default: float) -> float:
        where, value = name, config.get(name, default)
        if name in given:
            where, value = f"{place}.{name}", given[name]
        if value is None and name == "partial_rotary_factor" and partial is None:
            return default
        return float(check(where, value, _POSITIVE))

    share = number("partial_rotary_factor", 1.0 if partial is None else partial)
    if share > 1.0 or (partial is None and share != 1.0):
        limit = "1.0 for this family" if partial is None else "at most 1.0"
        raise wrong("partial_rotary_factor", share, limit)
    rope: Values = {"theta": number("rope_theta", 10000.0), "kind": kind, "partial": share}
    for name in _REQUIRED[kind]:
        if name not in given:
            raise FamilyError(f"config.json: {place}.{name} is missing; rope {kind} needs it")
        rope[name] = check(f"{place}.{name}", given[name], _POSITIVE)
    if kind in ("llama3", "yarn"):
        context = given.get(_CONTEXT, max_positions)
        context = context if config.get(_CONTEXT) is None else config[_CONTEXT]
        rope[_CONTEXT] = check(f"{place}.{_CONTEXT}", context, size(None))
    elif kind == "dynamic":  # transformers measures against the context itself
        rope[_CONTEXT] = max_positions
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        limit = "more than low_freq_factor"
        raise wrong(f"{place}.high_freq_factor", rope["high_freq_factor"], limit)
    if kind == "yarn":
        rope |= _read_yarn(given, place, max_positions / rope[_CONTEXT])
    return Rope(**rope)


def _read_yarn(given: Mapping[str, Any], place: str, ratio: float) -> Values:
    """The numbers of yarn with transformers' defaults; `attention_factor` worked out."""
    v: dict[str, float | None] = {
        name: None if given.get(name) is None else check(f"{place}.{name}", given[name], _POSITIVE)
        for name in _YARN
    }
    factor = v["factor"] or ratio
    scaled, by = v["mscale"], v["mscale_all_dim"]
    attention = v["attention_factor"]
    if attention is None:
        attention = _mscale(factor, scaled) / _mscale(factor, by) if scaled and by else None
    return {
        "factor": factor,
        "beta_fast": v["beta_fast"] or 32.0,
        "beta_slow": v["beta_slow"] or 1.0,
        "attention_factor": _mscale(factor, 1.0) if attention is None else attention,
        "truncate": check(f"{place}.truncate", given.get("truncate", True), flag(True)),
    }


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def write_rope(
    config: Values, rope: Rope, max_positions: int, full: bool, partial: float | None = None
) -> None:
    """Write both spellings, equal, unless `config` already means `rope` to readers of either one;
    always if `full`. The old spelling alone does: all read it.

    `partial` as in `read_rope`. Raises FamilyError if the context of `dynamic` is another one than
    the model's, for which there is no spelling.
    """
    given = config.get("rope_parameters")
    new = bool(given) and _means({"rope_parameters": given}, rope, max_positions, partial)
    old = {name: value for name, value in config.items() if name != "rope_parameters"}
    if not full and (new or not given) and _means(old, rope, max_positions, partial):
        return
    if rope.kind == "dynamic" and rope.original_max_position_embeddings != max_positions:
        raise FamilyError(
            f"rope: kind dynamic was made for {rope.original_max_position_embeddings} positions, "
            f"but max_position_embeddings is {max_positions}; config.json has one number for both"
        )
    scaling: Values = {n: getattr(rope, n) for n in ROPE_NEEDS[rope.kind] if n != _CONTEXT}
    config.pop(_CONTEXT, None)
    if rope.kind in ("llama3", "yarn"):
        scaling[_CONTEXT] = rope.original_max_position_embeddings
    if rope.kind == "llama3" and rope.original_max_position_embeddings != 8192:
        config[_CONTEXT] = rope.original_max_position_embeddings  # llama.cpp looks here only
    if rope.kind == "yarn" and not rope.truncate:
        scaling["truncate"] = False
    scaling["rope_type"] = rope.kind
    parameters = {**scaling, "rope_theta": rope.theta}
    if partial is not None:
        parameters["partial_rotary_factor"] = rope.partial
        config["partial_rotary_factor"] = rope.partial
    config["rope_theta"] = rope.theta
    config["rope_scaling"] = None if rope.kind == "default" else scaling
    config["rope_parameters"] = given if new and not full else parameters


def _means(config: Config, rope: Rope, max_positions: int, partial: float | None) -> bool:
    try:
        return read_rope(config, max_positions, partial) == rope
    except FamilyError:
        return False  # it cannot be read, so it is replaced
