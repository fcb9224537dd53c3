"""What happens to a step whose loss or gradient cannot be used, by the policy in the configuration.

The decision comes before the optimizer sees the gradient. Every rank decides for itself, from
numbers that are the same on all ranks, so all decide alike. What the decision depends on is saved
with the run, so a resumed run decides as the uninterrupted one would.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bevatron.train.config import SafetyConfig

# A window of nearly equal numbers says little about what is unusual: a standard deviation counts as
# at least this part of the mean.
SMALLEST_SPREAD = 0.01


@dataclass(frozen=True)
class Decision:
    """What becomes of a step. `reason` is one clause that names the numbers; empty for `apply`."""

    action: Literal["apply", "skip", "rewind", "stop"]
    reason: str = ""


class Guard:
    """Judges the loss and gradient norm of every step, and remembers what the next one needs.

    Attributes:
        skipped: steps whose update was dropped.
        rewound: first and last of the steps that a rewind undid or passed over, by rewind.
    """

    def __init__(self, safety: SafetyConfig) -> None:
        self.safety = safety
        self.skipped: list[int] = []
        self.rewound: list[tuple[int, int]] = []
        self.losses: deque[float] = deque(maxlen=safety.spike_window)
        self.norms: deque[float] = deque(maxlen=safety.spike_window)
        self.decision = Decision("apply")

    def decide(self, step: int, loss: float, norm: float) -> Decision:
        """Judge update number `step` (from 1) and take it into account."""
        policy, reason = self._trouble(loss, norm)
        if policy == "skip":
            window = self.safety.spike_window
            recent = 1 + sum(s > step - window for s in self.skipped)
            if recent > self.safety.max_skips:
                policy = "stop"
                reason += (
                    f", and {recent - 1} of the last {window} steps were skipped already "
                    f"(safety.max_skips: {self.safety.max_skips})"
                )
            else:
                self.skipped.append(step)
        elif policy == "rewind" and len(self.rewound) >= self.safety.max_rewinds:
            policy = "stop"
            reason += f", after {len(self.rewound)} rewinds (safety.max_rewinds)"
        elif policy == "apply":
            self.losses.append(loss)
            self.norms.append(norm)
        self.decision = Decision(policy, reason)
        return self.decision

    def _trouble(
        self, loss: float, norm: float
    ) -> tuple[Literal["apply", "skip", "rewind", "stop"], str]:
        safety = self.safety
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return safety.on_nonfinite, f"loss {loss:.6g}, gradient norm {norm:.6g}"
        if safety.on_spike != "ignore":
            for name, value, seen in (
                ("loss", loss, self.losses),
                ("gradient norm", norm, self.norms),
            ):
                if 2 * len(seen) < safety.spike_window:
                    continue
                mean, deviation = _moments(seen)
                if value > mean + safety.spike_sigma * deviation:
                    far = (value - mean) / deviation if deviation else math.inf
                    return safety.on_spike, (
                        f"{name} {value:.6g} is {far:.3g} standard deviations above the mean "
                        f"{mean:.6g} of the last {len(seen)} updates"
                    )
        return "apply", ""

    def updates(self, step: int, since: int = 0) -> int:
        """How many updates the optimizer has made of the steps from `since` to `step`."""
        skipped = sum(since < n <= step for n in self.skipped)
        passed = sum(
            last - max(first, since + 1) + 1 for first, last in self.rewound if last > since
        )
        return step - since - skipped - passed

    def state(self) -> dict[str, Any]:
        """What train_state.json keeps of it."""
        return {
            "skipped": self.skipped,
            "rewound": self.rewound,
            "losses": list(self.losses),
            "grad_norms": list(self.norms),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`; an empty one, of a run before there was a guard, starts anew."""
        self.skipped = list(state.get("skipped", []))
        self.rewound = [(first, last) for first, last in state.get("rewound", [])]
        for kept, name in ((self.losses, "losses"), (self.norms, "grad_norms")):
            kept.clear()
            kept.extend(state.get(name, []))


def event(step: int, kind: str, reason: str, loss: float, norm: float) -> dict[str, Any]:
    """A line of metrics.jsonl about a step that was not applied. JSON has no NaN: null there."""
    return {
        "step": step,
        "event": kind,
        "reason": reason,
        "loss": loss if math.isfinite(loss) else None,
        "grad_norm": norm if math.isfinite(norm) else None,
    }


def _moments(seen: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, the latter not below a part of the former."""
    mean = math.fsum(seen) / len(seen)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in seen) / len(seen))
    return mean, max(deviation, SMALLEST_SPREAD * abs(mean))
