"""The feed of preferences: examples, and what a reference said of them before."""

from __future__ import annotations

from collections.abc import Sequence

from bevatron.align.preference_rows import PreferenceRows, Survey
from bevatron.align.reference import Precomputed
from bevatron.data.dataset_rows import Rows
from bevatron.data.labelled_examples import Labelled
from bevatron.errors import BevatronError
from bevatron.train.config import RunConfig
from bevatron.train.feed import Batch
from bevatron.train.labelled_feed import Examples, LabelledFeed
from bevatron.train.run_start import Start
from bevatron.train.trainer import Trainer

SURVEYED = 256  # rows that a start looks at


class PreferenceFeed(LabelledFeed):
    """Prompts with several answers; every one comes once an epoch, in another order each."""

    precomputed: Precomputed | None = None

    @classmethod
    def check(cls, config: RunConfig, start: Start) -> None:
        found = survey(*cls.rows_of(config, start))
        if found.dropped == found.rows:
            raise BevatronError(
                f"data.seq_len {config.data.seq_len} leaves nothing of an answer of any of the "
                f"first {found.rows:,} rows, whose longest sequence has {found.longest:,} tokens; "
                "use longer sequences"
            )

    def bind(self, trainer: Trainer) -> None:
        super().bind(trainer)
        stored = trainer.objective.stored
        if isinstance(stored, Precomputed):
            examples = {"train": self.training}
            if self.validation is not None:
                examples["validation"] = self.validation
            stored.prepare(trainer, examples, self.alive)
            self.precomputed = stored

    def summary(self, steps: int) -> list[str]:
        lines = super().summary(steps)
        found = survey(self.training.rows, self.training.labelled)
        if found.cut:
            lines.append(
                f"of the first {found.rows:,} rows {found.cut:,} have an answer that loses its end "
                f"(the longest sequence has {found.longest:,} tokens), {found.dropped:,} one of "
                "which nothing is left: these count for nothing"
            )
        if self.precomputed is not None:
            lines.append(f"the reference's log-probabilities are in {self.precomputed.folder}")
        return lines

    def _samples(self, examples: Examples, numbers: Sequence[int]) -> Batch:
        rows = super()._samples(examples, numbers)
        if self.precomputed is None:
            return rows
        kind = "train" if examples is self.training else "validation"
        return rows | self.precomputed.read(kind, numbers, rows["tokens"])


def survey(rows: Rows, labelled: Labelled) -> Survey:
    """What the length does to the first rows."""
    assert isinstance(labelled, PreferenceRows)
    first = [rows[i] for i in range(min(SURVEYED, len(rows)))]
    return labelled.survey(first)
