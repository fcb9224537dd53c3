"""The feed of reward models: every example comes once an epoch. Those that are too long for a
sample count for nothing, which the start says."""

from __future__ import annotations

from bevatron.align.reward_rows import RewardPairs, ScoredAnswers
from bevatron.data.dataset_rows import Rows
from bevatron.errors import BevatronError
from bevatron.train.config import RunConfig
from bevatron.train.labelled_feed import LabelledFeed, labelled_of
from bevatron.train.run_start import Start

SURVEYED = 256  # rows that a start looks at


class RewardFeed(LabelledFeed):
    """Raises BevatronError if no example fits."""

    @classmethod
    def check(cls, config: RunConfig, start: Start) -> None:
        super().check(config, start)
        labelled = labelled_of(config, start)
        sources = [source.path for source in config.data.train]
        rows, cut, longest = survey(Rows(sources, labelled.check), labelled)
        if cut == rows:
            raise BevatronError(
                f"data.seq_len {config.data.seq_len} is too short for each of the first {rows:,} "
                f"rows, whose longest sequence has {longest:,} tokens; a score stands at a "
                "sequence's end, so use longer sequences"
            )

    def summary(self, steps: int) -> list[str]:
        lines = super().summary(steps)
        rows, cut, longest = survey(self.training.rows, self.training.labelled)
        if cut:
            lines.append(
                f"of the first {rows:,} rows {cut:,} are longer than data.seq_len (the longest "
                f"sequence has {longest:,} tokens): they count for nothing"
            )
        return lines


def survey(rows: Rows, labelled: object) -> tuple[int, int, int]:
    """Of the first rows how many there are, how many are too long, and the longest sequence."""
    assert isinstance(labelled, RewardPairs | ScoredAnswers)
    longest = [max(labelled.lengths(rows[i])) for i in range(min(SURVEYED, len(rows)))]
    return len(longest), sum(n > labelled.length for n in longest), max(longest)
