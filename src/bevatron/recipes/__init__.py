"""Run configurations that ship with the package: published recipes, each one YAML file.

A recipe is a configuration like any other, with two more parts: `recipe` describes it, and `prune`,
if the recipe starts from a pruned model, gives the sizes of this model. The comments at the top of
the file are the commands that lead from text to an exported model; the comments beside the keys say
what is published.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bevatron.errors import BevatronError
from bevatron.families.published_models import preset
from bevatron.spec import ModelSpec
from bevatron.spec.count import parameter_count
from bevatron.train.config import PruneConfig, RunConfig
from bevatron.train.config_file import load_config
from bevatron.train.nanochat_depth import DepthConfig

HERE = Path(__file__).parent
COMMAND = re.compile(r"#   (bevatron .*)")


@dataclass(frozen=True)
class Recipe:
    path: Path

    @cached_property
    def config(self) -> RunConfig:
        return load_config(self.path, [])

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def commands(self) -> list[str]:
        """From text to an exported model, in order; each is a line of a shell."""
        text = self.text.replace("\\\n#", " ")
        found = (COMMAND.fullmatch(line) for line in text.splitlines())
        return [" ".join(match[1].split()) for match in found if match]

    @property
    def spec(self) -> ModelSpec:
        """Of the model that it makes."""
        model = self.config.model
        if isinstance(model.spec, DepthConfig):
            return model.spec.model
        return preset(str(model.spec or model.like))

    def to_dict(self) -> dict[str, object]:
        """What it is, in numbers."""
        config = self.config
        assert config.recipe is not None
        sequences = config.train.global_batch * config.objective.sequences
        return {
            "name": config.recipe.name,
            "what": config.recipe.what,
            "from": config.recipe.from_,
            "parameters": parameter_count(self.spec),
            "tokens": config.train.steps * sequences * config.data.seq_len,
            "objective": config.objective.name,
            "source": config.recipe.source,
        }


def recipes() -> list[Recipe]:
    """All of them, by name."""
    return [Recipe(path) for path in sorted(HERE.glob("*.yaml"))]


def recipe(name: str) -> Recipe:
    """The recipe of that name. Raises BevatronError that names those nearest in spelling."""
    known = {found.path.stem: found for found in recipes()}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"nearest are {', '.join(near)}" if near else "`bevatron recipes` lists them"
    raise BevatronError(f"{name}: no such file, and no recipe has this name; {hint}")


def find(given: str | Path) -> Path:
    """The file of a run configuration: the path that is given, or the recipe of that name. A file
    that exists is never taken for a name."""
    path = Path(given)
    if path.is_file() or path.suffix in (".yaml", ".yml", ".json") or len(path.parts) != 1:
        return path
    return recipe(str(given)).path


def sizes(given: str) -> PruneConfig:
    """What a recipe, or a configuration file, prunes to."""
    found = load_config(find(given), []).prune
    if found is None:
        those = [other.path.stem for other in recipes() if other.config.prune is not None]
        raise BevatronError(f"{given}: has no prune part; recipes with one are {', '.join(those)}")
    return found


def table(rows: list[dict[str, object]]) -> str:
    """The list of recipes, as people read it."""
    lines = []
    for row in rows:
        origin = f"from {row['from']}, " if row["from"] else ""
        numbers = f"{row['parameters']:,} parameters, {row['tokens']:,} tokens"
        lines += [str(row["name"]), f"  {row['what']}", f"  {origin}{numbers}"]
    return "\n".join(lines)
