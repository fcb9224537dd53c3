"""Print what pyproject.toml depends on, extras included, without its ceilings: `make test-newest`.

A ceiling stands where a release has broken us; only a run past it tells whether to raise it."""

import re
import tomllib
from pathlib import Path

CEILING = re.compile(r",?\s*(<=?|==|~=)\s*[\w.*]+")


def newest(requirements: list[str]) -> list[str]:
    """Without upper bounds and pins, and without torch, which the Makefile names."""
    return sorted({CEILING.sub("", r) for r in requirements if not r.startswith("torch>")})


if __name__ == "__main__":
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [r for extra in project["optional-dependencies"].values() for r in extra]
    print("\n".join(newest(project["dependencies"] + extras)))
