"""What is decided before a search begins.

All options are checked, and the configuration of the distillations is made. The dry run is here
too; it needs only the spec of the model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bevatron.bridge.hf_config import understand
from bevatron.bridge.hf_folder import fetch_config, read_config
from bevatron.bridge.nanotron_read import is_nanotron, open_nanotron
from bevatron.bridge.open_native import read_spec
from bevatron.bridge.open_weights import open_weights
from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.read_boxes import hash_file
from bevatron.checkpoint.run_folder import is_native, resolve
from bevatron.checkpoint.storage import located
from bevatron.checkpoint.strict_json import read_object
from bevatron.compress.importance_command import layout_of
from bevatron.compress.importance_scores import Scores
from bevatron.compress.search.search_results import SearchError, described, stages_of
from bevatron.compress.search.search_space import Space, enumerate_space
from bevatron.compress.verb_options import Measuring, Processes, SearchOptions
from bevatron.data.sample_order import Sampler
from bevatron.data.token_store import TokenStore
from bevatron.errors import BevatronError
from bevatron.families.published_models import PRESETS, preset
from bevatron.families.registry import Family, by_name, for_spec
from bevatron.parallel.layout import Layout, LayoutError, check
from bevatron.spec import ModelSpec
from bevatron.spec.count import parameter_count
from bevatron.train.config import RunConfig
from bevatron.train.config_file import checked

# What the search says itself, and with which option.
OWN = {
    "model": "CKPT",
    "run": "DIR",
    "data.train": "--data",
    "data.validation": "--validation",
    "data.seq_len": "--seq-len",
    "train.steps": "--steps and --long-steps",
    "train.seed": "--seed",
    "train.precision": "--dtype",
    "parallel.tp": "--tp",
    "parallel.pp": "--pp",
    "parallel.dp_shard": "--dp-shard",
    "parallel.dp_replicate": "--nproc",
}


def given(path: str) -> str:
    """A path as every later start can use it, wherever it is started; a Hub id or URL as it is."""
    found = Path(path)
    return str(found.resolve()) if found.exists() else path


def configuration(
    *,
    student: Path,
    teacher: str,
    run: Path,
    steps: int,
    data: Sequence[Path],
    validation: Sequence[Path],
    seq_len: int,
    val_samples: int,
    precision: str,
    seed: int,
    layout: Layout,
    overrides: Sequence[str],
) -> RunConfig:
    """Of one distillation: Minitron's recipe (forward KL, cosine to a tenth, short warmup), with
    the held-out loss at ten moments, saved at four, changed by `overrides`. Raises SearchError."""
    for override in overrides:
        key = override.partition("=")[0]
        for own, option in OWN.items():
            if key == own or key.startswith(f"{own}.") or own.startswith(f"{key}."):
                raise SearchError(f"override {override!r}: {own} is the search's own: use {option}")
    raw: dict[str, Any] = {
        "model": {"init": str(student)},
        "objective": {"name": "distill", "teacher": teacher},
        "data": {
            "train": [{"path": given(str(p)), "weight": float(_tokens(p))} for p in data],
            "validation": [{"path": given(str(p))} for p in validation],
            "seq_len": seq_len,
        },
        "parallel": {
            "tp": layout.tp,
            "pp": layout.pp,
            "dp_shard": layout.dp_shard,
            "dp_replicate": layout.dp_replicate,
        },
        "train": {"steps": steps, "global_batch": 32, "precision": precision, "seed": seed},
        "optimizer": {"lr": 1e-4},
        "schedule": {"name": "cosine", "warmup_steps": min(40, steps // 10), "min_lr": 1e-5},
        "checkpoint": {"every": max(1, steps // 4), "keep": 1},
        "run": {"dir": str(run)},
    }
    raw["train"]["val_every"] = max(1, steps // 10)
    try:
        config = checked(raw, overrides, "the distillation's configuration")
    except BevatronError as error:
        raise SearchError(str(error)) from error
    if not any(override.startswith("train.val_batches=") for override in overrides):
        # As many samples as the loss of a stage is of.
        held_out = Sampler([(TokenStore.open(p), 1.0) for p in validation], seq_len, 0)
        samples = min(val_samples, held_out.epoch_length)
        batches = max(1, samples // config.train.global_batch)
        train = config.train.model_copy(update={"val_batches": batches})
        config = config.model_copy(update={"train": train})
    return config


def _tokens(path: Path) -> int:
    return TokenStore.open(path).tokens


def outline(ckpt: str) -> tuple[ModelSpec, Family]:
    """Of anything that holds weights, of a folder with a config.json alone, of a Hub id, whose
    config.json alone is downloaded, or of a published model by its name."""
    path = Path(ckpt)
    folder = located(ckpt)
    if folder.is_dir() and is_native(folder):
        native = resolve(folder)
        return read_spec(native), by_name(read_manifest(native).family)
    if is_nanotron(folder):
        foreign = open_nanotron(ckpt)
        return foreign.spec, by_name(foreign.manifest.family)
    if not path.exists() and ckpt in PRESETS:
        spec = preset(ckpt)
        return spec, for_spec(spec)
    config = read_config(path) if path.is_dir() else read_object(fetch_config(ckpt))
    try:
        family, spec, _ = understand(config)
    except BevatronError as error:
        raise type(error)(f"{ckpt}: {error}") from error
    return spec, family


def dry_run(ckpt: str, options: SearchOptions) -> dict[str, Any]:
    """What `search.json` would begin with. Nothing is computed or written."""
    spec, family = outline(ckpt)
    scores = Scores.read(options.scores) if options.scores is not None else None
    if scores is not None:
        scores.check(spec, str(options.scores))
    stages = stages_of(options)
    space, whole = enumerate_space(spec, family, options, options, scores), parameter_count(spec)
    return {
        "dry_run": True,
        "model": {"path": ckpt, "family": family.name, "parameters": whole, "loss": None},
        "request": {"params": options.params, "within": options.within},
        "space": space.to_dict(),
        "stages": stages,
        "candidates": [described(c, options.params, whole) for c in space.candidates],
        "best": None,
    }


class Asked:
    """A search that can be begun: the model opened, all options checked. Raises BevatronError."""

    def __init__(self, ckpt: str, options: SearchOptions) -> None:
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
        self.stages = stages_of(options)
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

        own = Measuring(self.options.samples, self.seq_len, seed=self.options.seed)
        plan = make_plan(self.spec, own)
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
        return enumerate_space(self.spec, self.family, self.options, self.options, scores)

    def request(self) -> dict[str, Any]:
        """Everything that decides the result, but not the layout: it changes rounding alone."""
        from bevatron.parallel.companion import Companion

        o = self.options
        hashes = {
            "data": [TokenStore.open(p).info.hash for p in o.data],
            "validation": [TokenStore.open(p).info.hash for p in o.validation],
            "scores": None if o.scores is None else hash_file(o.scores),
            "samples": o.samples if o.scores is None else None,
            "seq_len": self.seq_len,
            "overrides": sorted(o.overrides),
        }
        free = ("keep", *Processes.__dataclass_fields__)
        asked = {k: v for k, v in vars(o).items() if k not in free} | hashes
        return {
            "model": Companion(self.spec, self.opened).fingerprint()[:32],
            **{k: list(v) if isinstance(v, tuple) else v for k, v in asked.items()},
        }

    def config_of(self, student: Path, run: Path, steps: int) -> RunConfig:
        from bevatron.compress.importance import precision_of

        options = self.options
        exact = precision_of(self.opened, options.dtype) == "fp32"
        return configuration(
            student=student,
            teacher=given(self.ckpt),
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
