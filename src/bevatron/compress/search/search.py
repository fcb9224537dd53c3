"""Architecture search by Minitron's recipe (arXiv 2407.14679).

The model is pruned to all shapes near a parameter count, and the loss of each is measured. The best
shapes are distilled for a few steps, and the best of those for more steps. The loss on held-out
text decides.

Every result is written to `search.json` before the next computation begins (see `search_results`),
and models lie in folders that appear whole. So a search that was killed at any moment continues
where it was. Distillations are ordinary runs: they save steps and continue from them.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bevatron.checkpoint.folder_lock import lock
from bevatron.checkpoint.new_folder import make_parents, remove_empty, replace_text
from bevatron.checkpoint.run_folder import LOCK_PATIENCE_S, RunFolder, delete_folder, step_of
from bevatron.compress.importance_command import importance
from bevatron.compress.importance_scores import Scores
from bevatron.compress.prune import prune
from bevatron.compress.search.search_page import write_page
from bevatron.compress.search.search_request import Asked
from bevatron.compress.search.search_results import LONG, PRUNED, SHORT, SearchError, State
from bevatron.compress.search.search_space import Candidate, depths
from bevatron.compress.verb_options import Measuring, SearchOptions
from bevatron.errors import BevatronError
from bevatron.train.config_file import to_yaml

SCORES, BEST = "scores.safetensors", "best"


def say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Search:
    """A search in `folder`. Making one checks everything that can be checked; `run` begins it or
    goes on with it. Raises BevatronError, and SystemExit if a signal ended a distillation."""

    def __init__(
        self,
        ckpt: str,
        folder: Path,
        options: SearchOptions,
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        self.asked = Asked(ckpt, options)
        self.ckpt, self.folder, self.options, self.say = ckpt, folder, options, say
        self.stages = self.asked.stages

    # --- the search ---------------------------------------------------------------------------

    def run(self) -> State:
        """Begin or go on; to the end."""
        request = self.asked.request()
        made = make_parents(self.folder.absolute())
        what = f"{self.folder}: is being searched in"
        try:
            with lock(
                self.folder / ".lock",
                what,
                "wait for it, stop it, or name another folder",
                patience_s=LOCK_PATIENCE_S,
            ):
                clear(self.folder)
                model: dict[str, Any] = {"path": self.ckpt, "family": self.asked.family.name}
                model["parameters"] = self.asked.parameters
                model["validation"] = [str(path) for path in self.options.validation]
                self.state = State.begin(self.folder, request, model, self.stages)
                if results := sum(len(c["losses"]) for c in self.state.candidates):
                    self.say(f"{self.folder}: going on after {results} results")
                with _stdout_on_stderr():
                    self._go()
        finally:
            remove_empty(made)
        return self.state

    def _go(self) -> None:
        state = self.state
        scores = self._scores()
        space = self.asked.space(scores)
        self.asked.check_layouts(space)
        if not state.candidates:
            state.enter(space, self.options.params, self.asked.parameters)
        self.chosen: dict[str, Candidate] = {c.name: c for c in space.candidates}
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
        found.check(self.asked.spec, str(path))
        return found

    def _measure(self, path: Path) -> None:
        options, count = self.options, len(self.asked.spec.layers)
        gone = sorted({count - n for n in depths(self.asked.spec, options)} - {0})
        layers = {"influence": "bi", "loss": "loss", "span": "spans"}[options.depth_by]
        self.say("importance, once for all candidates")
        measuring = Measuring(
            samples=options.samples,
            seq_len=self.asked.seq_len,
            layers=layers if gone else "bi",
            spans=tuple(gone) if layers == "spans" else (),
            dtype=options.dtype,
            seed=options.seed,
        )
        importance(
            self.ckpt, path, options.data, measuring, options, html=self.folder / "importance.html"
        )

    def _stage(self, name: str, stage: dict[str, Any], scores: Scores) -> float:
        """Do what the stage asks of a candidate; its loss afterwards."""
        pruned, kind = self._place(name, PRUNED), stage["name"]
        run = self._place(name, kind)
        if not (kind != PRUNED and is_finished(run, stage["steps"])):
            if not pruned.is_dir():
                prune(self.ckpt, pruned, self.chosen[name].targets, scores=scores)
            if kind != PRUNED:
                self._distil(name, kind, stage["steps"])
        return self._loss(run)

    def _distil(self, name: str, kind: str, steps: int) -> None:
        from bevatron.train.launch import train

        run = self._place(name, kind).resolve()
        config = run.with_name(f"{kind}.yaml")
        made = self.asked.config_of(self._place(name, PRUNED).resolve(), run, steps)
        config.parent.mkdir(parents=True, exist_ok=True)
        replace_text(config, to_yaml(made))
        processes = self.asked.layout.world_size
        try:
            train(config, [], nproc=processes if processes > 1 else None)
        except BevatronError as error:
            raise type(error)(f"{name}, {_TITLES[kind]}: {error}") from error

    def _loss(self, model: str | Path) -> float:
        """Nats per token of held-out text, as `bevatron eval` gives them."""
        from bevatron.evaluate.perplexity import evaluate, open_engine

        options = self.options
        _free_memory()
        with open_engine(str(model), tp=options.tp, pp=options.pp, dtype=options.dtype) as engine:
            found = evaluate(
                engine,
                options.validation,
                seq_len=self.asked.seq_len,
                limit=options.val_samples * self.asked.seq_len + 1,
            )
        _free_memory()
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
                delete_folder(self._place(name, PRUNED))
            for k, stage in enumerate(self.stages[1:], 1):
                if stage["name"] in losses and not (k == last and leads):
                    drop_weights(self._place(name, stage["name"]))
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


def _free_memory() -> None:
    """Of an accelerator: what comes next, here or in other processes, plans with what is free."""
    import torch

    if torch.accelerator.is_available():
        gc.collect()  # a run that ended leaves cycles
        torch.accelerator.empty_cache()


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


# --- what is left of the distillations ------------------------------------------------------------


def is_finished(run: Path, steps: int) -> bool:
    """Whether the run's last step is saved."""
    newest = RunFolder(run).newest()
    return newest is not None and step_of(newest) >= steps


def drop_weights(run: Path) -> None:
    """Delete a run's steps. What it logged stays, for the page and for `bevatron report`."""
    for folder in RunFolder(run).folders():
        delete_folder(folder)
    (run / "latest").unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """What a process that was killed while deleting left behind."""
    for gone in folder.rglob(".*.deleted"):
        shutil.rmtree(gone, ignore_errors=True)
