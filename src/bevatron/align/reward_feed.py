"""The feed of reward models: every example comes once an epoch. Those that are too long for a
sample count for nothing, which the start says."""

from __future__ import annotations

from collections.abc import Sequence

from bevatron.align.preference_feed import SURVEYED
from bevatron.align.preference_rows import Survey
from bevatron.align.reward_rows import RewardPairs, ScoredAnswers
from bevatron.data.dataset_rows import Rows
from bevatron.errors import BevatronError
from bevatron.train.config import RunConfig
from bevatron.train.labelled_feed import LabelledFeed
from bevatron.train.run_start import Start


class RewardFeed(LabelledFeed):
    """Raises BevatronError if no example fits."""

    @classmethod
    def check(cls, config: RunConfig, start: Start) -> None:
        found = survey(*cls.rows_of(config, start))
        if found.cut == found.rows:
            raise BevatronError(
                f"data.seq_len {config.data.seq_len} is too short for each of the first "
                f"{found.rows:,} rows, whose longest sequence has {found.longest:,} tokens; a "
                "score stands at a sequence's end, so use longer sequences"
            )

    def summary(self, steps: int) -> list[str]:
        lines = super().summary(steps)
        found = survey(self.training.rows, self.training.labelled)
        if found.cut:
            lines.append(
                f"of the first {found.rows:,} rows {found.cut:,} are longer than data.seq_len (the "
                f"longest sequence has {found.longest:,} tokens): they count for nothing"
            )
        return lines


def survey(rows: Rows, labelled: object) -> Survey:
    """What the length does to the first rows."""
    assert isinstance(labelled, RewardPairs | ScoredAnswers)
    first: Sequence[dict[str, object]] = [rows[i] for i in range(min(SURVEYED, len(rows)))]
    return labelled.survey(first)
