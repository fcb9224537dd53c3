"""Architecture search by Minitron's recipe (arXiv 2407.14679): all shapes near a parameter count
are pruned and their loss measured; the best are distilled for a few steps, the best of these for
more; the loss on held-out text decides.

Every result goes into `search.json` before the next thing begins (see `search_state`), and what is
computed lies in folders that appear as a whole, so a search that is killed at any moment goes on
where it was. Distillations are ordinary runs: they save steps and continue from them.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bevatron.bridge.opened import Opened, open_weights
from bevatron.checkpoint.lock import lock
from bevatron.checkpoint.new_folder import make_parents, remove_empty
from bevatron.checkpoint.run_folder import LOCK_PATIENCE_S, hash_file
from bevatron.compress import search_runs as runs
from bevatron.compress.command import importance, layout_of
from bevatron.compress.prune import prune
from bevatron.compress.scores import Scores
from bevatron.compress.search_page import write_page
from bevatron.compress.search_space import (
    Axes,
    Candidate,
    Goal,
    Space,
    depths,
    enumerate_space,
)
from bevatron.compress.search_state import LONG, PRUNED, SHORT, SearchError, State, stages_of
from bevatron.data.store import TokenStore
from bevatron.errors import BevatronError
from bevatron.families.family import by_name
from bevatron.parallel.layout import LayoutError, check
from bevatron.spec.count import parameter_count
from bevatron.train.config import RunConfig

SCORES, BEST = "scores.safetensors", "best"


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


def say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Search:
    """A search in `folder`. Making one checks everything that can be checked; `run` begins it or
    goes on with it. Raises BevatronError, and SystemExit if a signal ended a distillation."""

    def __init__(
        self,
        ckpt: str,
        folder: Path,
        options: Options,
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        if "RANK" in os.environ:
            raise SearchError(
                "a search starts its processes itself; start it once, without torchrun, and say "
                "how many with --nproc"
            )
        self.ckpt, self.folder, self.options, self.say = ckpt, folder, options, say
        self.opened: Opened = open_weights(ckpt)
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
        self.config = self._config(Path("best"), Path("run"), max(1, options.steps))
        given = Scores.read(options.scores) if options.scores is not None else None
        if given is not None:
            given.check(self.spec, str(options.scores))
        if given is not None or len(set(self.spec.layers)) == 1:
            self._check_layouts(self._space(given))

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

    def _check_layouts(self, space: Space) -> None:
        """Every candidate must run at the layout, and the tokens must be the model's."""
        from bevatron.data.tokenizer import TOKENIZER
        from bevatron.train.feed import open_stores

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

    def _space(self, scores: Scores | None) -> Space:
        return enumerate_space(self.spec, self.family, self.options.axes, self.options.goal, scores)

    def _request(self) -> dict[str, Any]:
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

    def _config(self, student: Path, run: Path, steps: int) -> RunConfig:
        from bevatron.compress.importance import precision_of

        options = self.options
        exact = precision_of(self.opened, options.dtype) == "fp32"
        return runs.configuration(
            student=student,
            teacher=runs.given(self.ckpt),
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

    # --- the search ---------------------------------------------------------------------------

    def run(self) -> State:
        """Begin or go on; to the end."""
        request = self._request()
        made = make_parents(self.folder.absolute())
        what = f"{self.folder}: is being searched in"
        try:
            with lock(
                self.folder / ".lock",
                what,
                "wait for it, stop it, or name another folder",
                patience_s=LOCK_PATIENCE_S,
            ):
                runs.clear(self.folder)
                model: dict[str, Any] = {"path": self.ckpt, "family": self.family.name}
                model["parameters"] = self.parameters
                self.state = State.begin(self.folder, request, model, self.stages)
                with _stdout_on_stderr():
                    self._go()
        finally:
            remove_empty(made)
        return self.state

    def _go(self) -> None:
        state = self.state
        scores = self._scores()
        self.space = self._space(scores)
        self._check_layouts(self.space)
        if not state.candidates:
            state.enter(self.space, self.options.goal.parameters, self.parameters)
        self.chosen: dict[str, Candidate] = {c.name: c for c in self.space.candidates}
        if list(self.chosen) != [c["name"] for c in state.candidates]:
            raise SearchError(
                f"{self.folder}: holds other candidates than this version enumerates; go on with "
                "the version that began it, or name a new folder"
            )
        write_page(state)
        self._own_loss()
        for k, stage in enumerate(self.stages):
            names = list(self.chosen)
            if k:
                names = state.best(self.stages[k - 1]["name"], stage["entrants"])
            for at, name in enumerate(names, 1):
                if stage["name"] not in self._found(name)["losses"]:
                    self.say(f"{_TITLES[stage['name']]}, {at} of {len(names)}: {name}")
                    loss = self._stage(name, stage, scores)
                    state.record(stage["name"], name, loss)
                    self.say(f"{name}: loss {loss:.4f}")
                    write_page(state)
                self._tidy()
        self._finish()

    def _own_loss(self) -> None:
        """Of the model that is pruned, for comparison."""
        model = self.state.found["model"]
        if model["loss"] is None:
            loss = self._loss(self.ckpt)
            if not math.isfinite(loss):
                raise SearchError(
                    f"{self.ckpt}: its own loss is {loss}; there is nothing to compare"
                )
            model["loss"] = loss
            self.state.write()
        self.say(f"{self.ckpt}: loss {model['loss']:.4f} on held-out text")

    def _scores(self) -> Scores:
        """Copied from what was given, or measured; once."""
        path, options = self.folder / SCORES, self.options
        if not path.is_file():
            if options.scores is not None:
                Scores.read(options.scores).write(path)
            else:
                self._measure(path)
        found = Scores.read(path)
        found.check(self.spec, str(path))
        return found

    def _measure(self, path: Path) -> None:
        options, count = self.options, len(self.spec.layers)
        gone = sorted({count - n for n in depths(self.spec, options.axes)} - {0})
        layers = {"influence": "bi", "loss": "loss", "span": "spans"}[options.goal.depth_by]
        self.say("importance, once for all candidates")
        importance(
            self.ckpt,
            path,
            options.data,
            tp=options.tp,
            pp=options.pp,
            dp_shard=options.dp_shard,
            nproc=options.nproc,
            html=self.folder / "importance.html",
            samples=options.samples,
            seq_len=self.seq_len,
            aggregation="l2,mean",
            layers=layers if gone else "bi",
            spans=gone if layers == "spans" else [],
            loss_samples=128,
            dtype=options.dtype,
            seed=options.seed,
        )

    def _stage(self, name: str, stage: dict[str, Any], scores: Scores) -> float:
        """Do what the stage asks of a candidate; its loss afterwards."""
        pruned, kind = self._place(name, PRUNED), stage["name"]
        run = self._place(name, kind)
        if not (kind != PRUNED and runs.is_finished(run, stage["steps"])):
            if not pruned.is_dir():
                prune(self.ckpt, pruned, self.chosen[name].targets, scores=scores)
            if kind != PRUNED:
                self._distil(name, kind, stage["steps"])
        return self._loss(run)

    def _distil(self, name: str, kind: str, steps: int) -> None:
        from bevatron.train.launch import train

        run = self._place(name, kind).resolve()
        config = run.with_name(f"{kind}.yaml")
        runs.write(self._config(self._place(name, PRUNED).resolve(), run, steps), config)
        processes = self.layout.world_size
        try:
            train(config, [], nproc=processes if processes > 1 else None)
        except BevatronError as error:
            raise type(error)(f"{name}, {_TITLES[kind]}: {error}") from error

    def _loss(self, model: str | Path) -> float:
        """Nats per token of held-out text, as `bevatron eval` gives them."""
        import torch

        from bevatron.evaluate.opening import open_engine
        from bevatron.evaluate.perplexity import evaluate

        options = self.options
        with open_engine(str(model), tp=options.tp, pp=options.pp, dtype=options.dtype) as engine:
            found = evaluate(
                engine,
                options.validation,
                seq_len=self.seq_len,
                limit=options.val_samples * self.seq_len + 1,
            )
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()  # processes that train next want the memory
        return float(found["loss"])

    # --- folders ------------------------------------------------------------------------------

    def _place(self, name: str, kind: str) -> Path:
        return self.folder / "candidates" / name / kind

    def _found(self, name: str) -> dict[str, Any]:
        return next(c for c in self.state.candidates if c["name"] == name)

    def _tidy(self) -> None:
        """Delete weights that no later stage can ask for: of those that have fallen behind, and of
        runs but the best of the last stage."""
        if self.options.keep:
            return
        last = len(self.stages) - 1
        for name in self.chosen:
            losses = self._found(name)["losses"]
            leads = name in self.state.best(self.stages[last]["name"], 1)
            wanted = any(
                stage["name"] not in losses and self._may_enter(name, k)
                for k, stage in enumerate(self.stages)
            )
            if not wanted and not (last == 0 and leads):
                runs.remove(self._place(name, PRUNED))
            for k, stage in enumerate(self.stages[1:], 1):
                if stage["name"] in losses and not (k == last and leads):
                    runs.drop_weights(self._place(name, stage["name"]))
            _remove_if_empty(self._place(name, PRUNED).parent)

    def _may_enter(self, name: str, number: int) -> bool:
        """Whether a candidate is, or may still come, among those of a stage."""
        if number == 0:
            return True
        before = self.stages[number - 1]["name"]
        if before in self._found(name)["losses"]:
            return name in self.state.best(before, self.stages[number]["entrants"])
        return self._may_enter(name, number - 1)

    def _finish(self) -> None:
        """Give the winner its place."""
        state, stage = self.state, self.stages[-1]["name"]
        if state.found["best"] is None:
            name = state.best(stage, 1)[0]
            source, target = self._place(name, stage), self.folder / BEST
            if source.is_dir() and not target.exists():
                source.rename(target)
            loss = self._found(name)["losses"][stage]
            state.found["best"] = {"name": name, "stage": stage, "loss": loss, "path": BEST}
            state.write()
            _remove_if_empty(source.parent)
        write_page(state)


_TITLES = {PRUNED: "pruning", SHORT: "short distillation", LONG: "long distillation"}


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """What processes print that are started meanwhile: stdout is for the search's own result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
