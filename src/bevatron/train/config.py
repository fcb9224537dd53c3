"""The run configuration: what a YAML file may say, checked in full before anything starts."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from bevatron.spec.model import Role

Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Strict, frozen, and no unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True
    )


class ModelConfig(Section):
    """What to start from: weights (`init`), or random ones of a preset or spec file (`spec`).
    `like` names the preset or spec file whose sizes the weights at `init` have: a dry run takes its
    word where they are not on this disk, a run refuses others. `init_std` and `depth_scaled` of
    random weights are the spec's own if absent."""

    init: str | None = None
    like: str | None = None
    spec: str | None = None
    init_std: float | None = Field(None, ge=0)
    depth_scaled: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> ModelConfig:
        if (self.init is None) == (self.spec is None):
            raise ValueError("give exactly one of init (weights) and spec (random weights)")
        if self.like is not None and self.init is None:
            raise ValueError(
                "like says what the weights at init are, but there is no init; drop it"
            )
        if self.spec is None and (self.init_std is not None or self.depth_scaled is not None):
            raise ValueError("init_std and depth_scaled are for random weights, but init is given")
        return self


# Every objective, and the settings that mean something to it.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "pretrain": ("z_loss",),
    "distill": (
        "teacher",
        "teacher_like",
        "logits",
        "states",
        "divergence",
        "temperature",
        "top_k",
        "ce",
    ),
    "sequence_classification": ("labels", "problem_type", "new_head"),
    "token_classification": ("labels", "new_head", "label_all_tokens", "join_words"),
    "question_answering": ("new_head", "stride"),
}
UNLABELLED = ("pretrain", "distill")  # these read token stores


class StatesConfig(Section):
    """Which hidden states of a student are drawn to its teacher's, and how; see
    `compress.states.StatesLoss`. `layers`: the student's layer -> the teacher's, counted from 0, or
    `all` of two models with as many. `embedding`: what enters the first layer, too. `project`: by
    default where the widths differ."""

    layers: Literal["all"] | dict[str, int] = {}
    embedding: bool = False
    loss: Literal["cosine", "mse"] = "cosine"
    weight: Literal["dynamic"] | float = "dynamic"
    project: bool | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        known = value == "all" or (
            isinstance(value, dict)
            and all(str(k).isdecimal() and type(v) is int for k, v in value.items())
        )
        if not known:
            raise ValueError(
                "expected all, or the teacher's layer for each of the student's, counted from 0, "
                f"as in {{13: 29}}, found {value!r}"
            )
        return value

    @field_validator("weight", mode="before")
    @classmethod
    def _weight(cls, value: Any) -> Any:
        if value != "dynamic" and (type(value) not in (int, float) or not 0 <= value < math.inf):
            raise ValueError(f"expected dynamic, or a number from 0 on, found {value!r}")
        return value

    @model_validator(mode="after")
    def _some(self) -> StatesConfig:
        if not self.layers and not self.embedding:
            raise ValueError("names no states; give layers, as in {13: 29}, or embedding: true")
        return self


class ObjectiveConfig(Section):
    """What is minimised. `name` is one of OBJECTIVES.

    Attributes:
        z_loss: weight of the mean of logsumexp(logits)^2 (PaLM: 1e-4), reported apart.
        teacher: the model to distil from: a native checkpoint, a run, an HF folder or a Hub id.
        teacher_like: the preset or spec file whose sizes it has, as `model.like`.
        logits: instead of it, a folder of `bevatron logits` with what a teacher said before.
        states: of the layers, which are compared besides the logits.
        divergence, temperature, top_k, ce: see `compress.divergence.Divergence`.
        labels: names, in order; of the new head that a language model gets.
        problem_type: of that head; by default regression for one label, else single_label.
        new_head: replace the head that the model has by a freshly initialised one.
        label_all_tokens: a word's label for all of its tokens (B-X continued as I-X), not only for
            the first.
        join_words: tokenize words joined by spaces, as text has them at inference, rather than one
            by one, as transformers' scripts do.
        stride: tokens that neighbouring windows of a long context share; without it a context is
            cut off where the sequence is full.
    """

    name: str = "pretrain"
    z_loss: float = Field(0.0, ge=0)
    teacher: str | None = None
    teacher_like: str | None = None
    logits: str | None = None
    states: StatesConfig | None = None
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    temperature: float = Field(1.0, gt=0)
    top_k: int | None = Field(None, ge=1)
    ce: float = Field(0.0, ge=0)
    labels: list[str] = []
    problem_type: (
        Literal["regression", "single_label_classification", "multi_label_classification"] | None
    ) = None
    new_head: bool = False
    label_all_tokens: bool = False
    join_words: bool = False
    stride: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _known(self) -> ObjectiveConfig:
        if self.name not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise ValueError(f"name {self.name!r} is unknown; known are {known}")
        for key, field in type(self).model_fields.items():
            if key == "name" or key in OBJECTIVES[self.name]:
                continue
            if getattr(self, key) != field.default:
                takers = " or ".join(name for name, keys in OBJECTIVES.items() if key in keys)
                raise ValueError(f"{key} means nothing to {self.name}, only to {takers}; drop it")
        if self.name == "distill" and (self.teacher is None) == (self.logits is None):
            raise ValueError(
                "distill needs a teacher; name its folder in objective.teacher, or that of its "
                "stored logits in objective.logits, and not both"
            )
        if self.states is not None and self.teacher is None:
            raise ValueError("states needs objective.teacher: stored logits have no states")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels has a name twice; name every label once")
        return self


class SourceConfig(Section):
    """A token store and its share of the mixture."""

    path: str
    weight: float = Field(1.0, gt=0)


class StageConfig(Section):
    """A mixture that takes over at a step. A store that was used before goes on where it was."""

    from_step: int = Field(ge=1)
    train: list[SourceConfig] = Field(min_length=1)


class DataConfig(Section):
    """`train` is the mixture from step 0 on, `stages` are the later ones; `validation` is read in
    order, so every run sees the same. `seq_len` is in tokens. `document_mask`: tokens of a sample
    see their own document alone. `allow_other_tokenizer`: the stores need not be made with the
    model's."""

    train: list[SourceConfig] = Field(min_length=1)
    stages: list[StageConfig] = []
    validation: list[SourceConfig] = []
    seq_len: int = Field(gt=0)
    document_mask: bool = False
    allow_other_tokenizer: bool = False

    @model_validator(mode="after")
    def _ascending(self) -> DataConfig:
        steps = [stage.from_step for stage in self.stages]
        if steps != sorted(set(steps)):
            raise ValueError(f"stages begin at steps {steps}, expected ascending ones")
        return self

    def sources(self) -> list[SourceConfig]:
        """All that are named anywhere."""
        later = [source for stage in self.stages for source in stage.train]
        return [*self.train, *later, *self.validation]


class ParallelConfig(Section):
    """Sizes of the mesh. `dp_shard` defaults to what is left of the processes.

    `schedule` is of the pipeline: 1f1b, gpipe, interleaved_1f1b, interleaved_zero_bubble or zbv.
    Interleaved ones run `virtual_stages` stages on every rank (2 if absent), zbv always 2. `split`
    is layers per stage, in the order of the model; balanced in time and memory if absent.
    `shard` is what dp_shard ranks share out: full (parameters too, gathered for every use) or
    gradients (gradients and optimizer state; parameters are gathered once per step)."""

    tp: int = Field(1, ge=1)
    pp: int = Field(1, ge=1)
    dp_shard: int | None = Field(None, ge=1)
    dp_replicate: int = Field(1, ge=1)
    cp: int = Field(1, ge=1)
    sequence_parallel: bool = True
    schedule: str = "1f1b"
    virtual_stages: int | None = Field(None, ge=1)
    split: list[int] | None = None
    shard: Literal["full", "gradients"] = "full"


class TrainConfig(Section):
    """Batches are in samples of `data.seq_len` tokens."""

    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    micro_batch: int = Field(1, ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    seed: int = Field(0, ge=0)
    val_every: int = Field(0, ge=0)
    val_batches: int = Field(1, ge=1)


class MuonConfig(Section):
    """Muon's own settings. Momentum rises from `momentum_start` over `momentum_warmup` updates.
    `dtype` of the Newton-Schulz iterations: that of `train.precision` if absent. `scale` of an
    update [rows, columns]: `nanochat` max(1, rows/columns)^0.5, `moonshot` 0.2 max(rows,
    columns)^0.5, which suits a learning rate and weight decay made for AdamW."""

    momentum: Beta = 0.95
    momentum_start: Beta = 0.85
    momentum_warmup: int = Field(300, ge=0)
    iterations: int = Field(5, ge=1)
    dtype: Literal["bf16", "fp32"] | None = None
    scale: Literal["nanochat", "moonshot"] = "nanochat"


class OptimizerConfig(Section):
    """`muon` updates the layers' matrices with Muon and the rest (embedding, head, norms, biases,
    scores) with AdamW. `no_decay` lists the roles without weight decay, `lr_scale` multiples of the
    learning rate by role (1 for roles that it does not name; with Muon NanoChat's)."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0)
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)  # YAML gives a list
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    no_decay: list[Role] = ["norm", "embedding", "bias"]
    lr_scale: dict[Role, Annotated[float, Field(gt=0)]] = {}
    clip_grad: float = Field(1.0, ge=0)
    muon: MuonConfig = MuonConfig()


class ScheduleConfig(Section):
    """Linear warmup over `warmup_steps`, then down to `min_lr` at the last step: as a `cosine`,
    `linear`, by `one_sqrt` (1 - sqrt of the way), or not at all (`constant`). `wsd` stays constant
    and decays in the shape `decay` over the last `decay_steps`, or the share `decay_fraction` of
    `train.steps`."""

    name: Literal["cosine", "constant", "linear", "one_sqrt", "wsd"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    min_lr: float = Field(0.0, ge=0)
    decay_steps: int | None = Field(None, ge=1)
    decay_fraction: float = Field(0.2, gt=0, le=1)
    decay: Literal["linear", "one_sqrt", "cosine"] = "linear"


class CheckpointConfig(Section):
    """Which steps are saved, and which stay.

    `every`: save every so many steps (0: only at the end). `keep`: so many of the newest stay, and
    all that `keep_every` divides (0: none of these). `weights_every`: save the weights alone every
    so many steps, into folders of their own that cannot be resumed; `weights_keep` of the newest
    stay (0: all). `async`: steps go on while a checkpoint is written from a copy in host memory;
    by default with an accelerator, whose state lies elsewhere than the copy. `export`: a folder
    that gets the final model as Hugging Face has it.
    """

    every: int = Field(0, ge=0)
    keep: int = Field(3, ge=1)
    keep_every: int = Field(0, ge=0)
    weights_every: int = Field(0, ge=0)
    weights_keep: int = Field(0, ge=0)
    async_: bool | None = Field(None, alias="async")
    export: str | None = None


class SafetyConfig(Section):
    """What a run does about trouble. Decided before the optimizer sees a gradient, by numbers that
    are the same on all ranks, and recorded in metrics.jsonl as a line with an `event`.

    Attributes:
        on_nonfinite: a loss or gradient norm that is NaN or infinite. `stop` ends the run; `skip`
            drops the update (the step counts and its data is used up); `rewind` goes back to the
            weights of the newest saved step and passes over the data from there to here.
        on_spike: the same for a finite loss or norm more than `spike_sigma` standard deviations
            above the mean of the last `spike_window` updates; judged once half of them are there.
        max_skips: that many among the last `spike_window` steps are too many: the run stops.
        max_rewinds: of the whole run.
        hang_timeout_s: when nothing moves for so long, the run ends and names the rank that the
            others wait for; 0 never does.
        check_replicas_every: compare replicated parameters between ranks every so many steps.
        replay_every: compute a step's gradients twice every so many steps; they must be equal.
    """

    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    on_spike: Literal["ignore", "skip", "stop", "rewind"] = "ignore"
    spike_sigma: float = Field(6.0, gt=0)
    spike_window: int = Field(128, ge=4)
    max_skips: int = Field(10, ge=0)
    max_rewinds: int = Field(3, ge=0)
    hang_timeout_s: float = Field(1800.0, ge=0)
    check_replicas_every: int = Field(0, ge=0)
    replay_every: int = Field(0, ge=0)


class LogConfig(Section):
    """metrics.jsonl has a line every so many steps; trackers get the same numbers. `name` is the
    run's in them (default: the folder's), `peak_tflops` what MFU is of (default: the device's)."""

    every: int = Field(1, ge=1)
    tensorboard: bool = False
    trackio: bool = False
    wandb: bool = False
    project: str = "bevatron"
    name: str | None = None
    peak_tflops: float | None = Field(None, gt=0)


class FolderConfig(Section):
    dir: str


class RecipeConfig(Section):
    """What a configuration says of itself, if it is a recipe; no run depends on it.

    Attributes:
        name: what `bevatron recipes` calls it.
        what: a line on what it is for; `source`: where its numbers are published.
        from: the preset of the model that is pruned or trained on; none for random weights.
        world: processes that a dry run is of unless it is told otherwise.
    """

    name: str
    what: str
    source: str | None = None
    from_: str | None = Field(None, alias="from")
    world: int = Field(1, ge=1)


class PruneConfig(Section):
    """Sizes for `bevatron prune --recipe`, which makes the model that this run starts from. Each
    is the option of that name; an axis that is absent stays as it is."""

    hidden_size: int | None = Field(None, ge=1)
    intermediate_size: int | None = Field(None, ge=1)
    num_attention_heads: int | None = Field(None, ge=1)
    num_layers: int | None = Field(None, ge=1)
    drop_layers: str | None = None


class RunConfig(Section):
    """The whole file."""

    recipe: RecipeConfig | None = None
    prune: PruneConfig | None = None
    model: ModelConfig
    tokenizer: str | None = None
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    safety: SafetyConfig = SafetyConfig()
    log: LogConfig = LogConfig()
    run: FolderConfig

    @model_validator(mode="after")
    def _rewinds_have_a_target(self) -> RunConfig:
        if "rewind" in (self.safety.on_nonfinite, self.safety.on_spike) and (
            not self.checkpoint.every
        ):
            raise ValueError("safety says rewind, which needs saved steps: set checkpoint.every")
        return self

    @model_validator(mode="after")
    def _validation_has_data(self) -> RunConfig:
        if self.train.val_every and not self.data.validation:
            raise ValueError("train.val_every is set but data.validation is empty")
        return self

    @model_validator(mode="after")
    def _rates_fall(self) -> RunConfig:
        low, high = self.schedule.min_lr, self.optimizer.lr
        if low > high:
            raise ValueError(f"schedule.min_lr {low:g} is above optimizer.lr {high:g}")
        return self


# Sections and keys whose change would change the numbers, or what a step is.
FIXED: tuple[str, ...] = ("objective", "optimizer", "schedule", "data.train", "data.seq_len")
FIXED += ("data.document_mask", "train.seed", "train.global_batch", "train.precision")
FIXED += ("data.stages",)


def changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys that differ and may not change between starts of one run."""
    before, after = flat(old), flat(new)
    keys = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    return [k for k in keys if any(k == f or k.startswith(f + ".") for f in FIXED)]


def flat(config: RunConfig) -> dict[str, Any]:
    out: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)
        else:
            out[path] = value

    walk(config.model_dump(mode="json", by_alias=True), "")
    return out
