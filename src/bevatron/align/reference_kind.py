"""The keys that say which model a policy is compared with."""

from __future__ import annotations

from typing import ClassVar

from bevatron.train.config_objective import Kind


class ReferenceKind(Kind):
    """What is compared with a reference policy, a frozen model with the same tokens."""

    paths: ClassVar[tuple[str, ...]] = ("reference",)

    reference: str | None = None
    """The frozen model that the trained one is compared with: a native checkpoint, a run, an HF
    folder or a Hub id; if absent, what the run starts from (`model`), without an adapter."""
    reference_like: str | None = None
    """Preset or spec file whose sizes the reference has, as `model.like`."""
