from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.served import Served, make_endless, make_model, served

ATTACKS = {
    "ssti": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "giant": "{{ 'a' * 1000000000 }}",
}
OPEN = ("--cors", "https://app.example", "--allow-host", "my.example")
HOSTILE = "".join(
    f"{{% if messages[0].content == '{name}' %}}{attack}{{% endif %}}"
    for name, attack in ATTACKS.items()
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[Served]:
    """One server for all tests that leave it as it was."""
    with served(model, "--timeout", "5", "--max-batch", "8") as running:
        yield running
        assert running.idle(), "an answer still holds a part of the cache"


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Its answers run until somebody ends them: what is tried on them does not depend on how fast
    the machine is."""
    folder = make_endless(tmp_path_factory.mktemp("endless") / "m")
    with served(folder, "--max-batch", "8") as running:
        yield running
        assert running.idle()


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Its template attacks when the first message says so. Its model never says eos."""
    template = HOSTILE + "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = make_model(tmp_path_factory.mktemp("hostile") / "m", template=template, eos=None)
    with served(folder, "--timeout", "1", "--api-key", "s3cret", *OPEN) as running:
        running.headers = {"Authorization": "Bearer s3cret"}
        yield running
        assert running.idle()
