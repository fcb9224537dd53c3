"""What a search is asked for, and every check of it that needs no computing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bevatron.bridge.open_weights import open_weights
from bevatron.checkpoint.run_folder import hash_file
from bevatron.compress.importance_command import layout_of
from bevatron.compress.importance_scores import Scores
from bevatron.compress.search import search_runs
from bevatron.compress.search.search_space import Axes, Goal, Space, enumerate_space
from bevatron.compress.search.search_state import SearchError, stages_of
from bevatron.data.token_store import TokenStore
from bevatron.families.registry import by_name
from bevatron.parallel.layout import LayoutError, check
from bevatron.spec.count import parameter_count
from bevatron.train.config import RunConfig


@dataclass(frozen=True)
class Options:
    """What a search is asked for.

    Attributes:
        data: token stores for importance and distillation; `validation`: held-out ones.
        scores: of `bevatron importance`; measured on `samples` samples if absent.
        seq_len: tokens of a sample; `val_samples`: of held-out text per loss.
        steps, short: of the short distillation, and how many candidates get it; `long_steps`,
            `long`: of the longer one. 0 steps: the stage is left out.
        overrides: `section.key=value` of the distillations' configuration.
        keep: delete no weights.
    """

    axes: Axes
    goal: Goal
    data: tuple[Path, ...]
    validation: tuple[Path, ...]
    scores: Path | None = None
    samples: int = 1024
    seq_len: int | None = None
    val_samples: int = 128
    steps: int = 400
    short: int = 8
    long_steps: int = 0
    long: int = 2
    overrides: tuple[str, ...] = ()
    dtype: str | None = None
    seed: int = 0
    keep: bool = False
    tp: int = 1
    pp: int = 1
    dp_shard: int | None = None
    nproc: int | None = None


class Asked:
    """A search that can be begun: the model opened, all options checked. Raises BevatronError."""

    def __init__(self, ckpt: str, options: Options) -> None:
        if "RANK" in os.environ:
            raise SearchError(
                "a search starts its processes itself; start it once, without torchrun, and say "
                "how many with --nproc"
            )
        self.ckpt, self.options = ckpt, options
        self.opened = open_weights(ckpt)
        self.spec, self.family = self.opened.spec, by_name(self.opened.manifest.family)
        if self.spec.head.kind != "causal_lm":
            raise SearchError(
                f"{ckpt}: has the head {self.spec.head.kind}; a search compares language models"
            )
        self.parameters = parameter_count(self.spec)
        count = options.tp * options.pp * (options.dp_shard or 1)
        self.layout = layout_of(options.nproc or count, options.tp, options.pp, options.dp_shard)
        context = self.spec.max_position_embeddings
        self.seq_len = options.seq_len or min(2048, context)
        self.stages = stages_of(options.steps, options.short, options.long_steps, options.long)
        self._check_data()
        self.config = self.config_of(Path("best"), Path("run"), max(1, options.steps))
        given = Scores.read(options.scores) if options.scores is not None else None
        if given is not None:
            given.check(self.spec, str(options.scores))
        if given is not None or len(set(self.spec.layers)) == 1:
            self.check_layouts(self.space(given))

    # --- checks -------------------------------------------------------------------------------

    def _check_data(self) -> None:
        options, context = self.options, self.spec.max_position_embeddings
        if not options.data or not options.validation:
            missing = "--data" if not options.data else "--validation"
            raise SearchError(
                f"{missing} is missing: a search distils on the token stores of --data and "
                "compares losses on those of --validation (make them with `bevatron tokenize`)"
            )
        if not 1 <= self.seq_len <= context:
            raise SearchError(
                f"--seq-len is {self.seq_len}, the model's context has {context} tokens; expected "
                "1 to that"
            )
        stores = {p: TokenStore.open(p) for p in (*options.data, *options.validation)}
        hashes = {stores[p].info.hash for p in options.data}
        for path in options.validation:
            if stores[path].info.hash in hashes:
                raise SearchError(
                    f"{path}: is --data and --validation; held-out text must be other text"
                )
        if options.scores is None:
            self._check_calibration()

    def _check_calibration(self) -> None:
        """What importance would refuse."""
        from bevatron.compress.importance import make_plan, open_sampler

        plan = make_plan(
            self.spec, self.options.samples, self.seq_len, "l2,mean", "bi", (), 1, self.options.seed
        )
        open_sampler(self.opened, self.options.data, plan, self.layout)

    def check_layouts(self, space: Space) -> None:
        """Every candidate must run at the layout, and the tokens must be the model's."""
        from bevatron.data.tokenizer import TOKENIZER
        from bevatron.train.token_feed import open_stores

        source, train = self.opened.source, self.config.train
        has = source is not None and (source / TOKENIZER).is_file()
        open_stores(self.config.data, self.spec, source if has else None)
        for candidate in space.candidates:
            try:
                check(
                    self.layout,
                    candidate.spec,
                    seq_len=self.seq_len,
                    global_batch=train.global_batch,
                    micro=train.micro_batch,
                )
            except LayoutError as error:
                raise LayoutError(f"candidate {candidate.name}: {error}") from None

    # --- what is asked for --------------------------------------------------------------------

    def space(self, scores: Scores | None) -> Space:
        return enumerate_space(self.spec, self.family, self.options.axes, self.options.goal, scores)

    def request(self) -> dict[str, Any]:
        """Everything that decides the result, but not the layout: it changes rounding alone."""
        from bevatron.parallel.companion import Companion

        o, goal, axes = self.options, self.options.goal, self.options.axes
        measured = o.scores is None
        return {
            "model": Companion(self.spec, self.opened).fingerprint()[:32],
            "params": goal.parameters,
            "within": goal.within,
            **{name: list(v) if v is not None else None for name, v in vars(axes).items()},
            "multiple": goal.multiple,
            "max_candidates": goal.most,
            "depth_by": goal.depth_by,
            "data": [TokenStore.open(p).info.hash for p in o.data],
            "validation": [TokenStore.open(p).info.hash for p in o.validation],
            "scores": None if o.scores is None else hash_file(o.scores),
            "samples": o.samples if measured else None,
            "seq_len": self.seq_len,
            "val_samples": o.val_samples,
            "steps": o.steps,
            "short": o.short,
            "long_steps": o.long_steps,
            "long": o.long,
            "overrides": sorted(o.overrides),
            "dtype": o.dtype,
            "seed": o.seed,
        }

    def config_of(self, student: Path, run: Path, steps: int) -> RunConfig:
        from bevatron.compress.importance import precision_of

        options = self.options
        exact = precision_of(self.opened, options.dtype) == "fp32"
        return search_runs.configuration(
            student=student,
            teacher=search_runs.given(self.ckpt),
            run=run,
            steps=steps,
            data=options.data,
            validation=options.validation,
            seq_len=self.seq_len,
            val_samples=options.val_samples,
            precision="fp32" if exact else "bf16",
            seed=options.seed,
            layout=self.layout,
            overrides=options.overrides,
        )
