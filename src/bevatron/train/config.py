"""The run configuration: what a YAML file may say, checked in full before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bevatron.spec import Role
from bevatron.train.adapter_config import AdapterConfig
from bevatron.train.config_objective import ObjectiveConfig, Section, kind_of
from bevatron.train.model_override import OverrideConfig
from bevatron.train.nanochat_depth import DepthConfig, filled, told

Beta = Annotated[float, Field(ge=0, lt=1)]
EVERY = 500  # steps between two saves, and between two validations, unless a run says otherwise


def _spec(given: Any) -> Any:
    """A name, or the dial. Raises ValueError for anything else."""
    if isinstance(given, Mapping):
        return DepthConfig.model_validate(dict(given))
    if given is not None and not isinstance(given, (str, DepthConfig)):
        raise ValueError("expected a preset, a spec file, or {depth: 20}")
    return given


class ModelConfig(Section):
    """What to start from: weights (`init`), or random ones of a preset or spec file (`spec`)."""

    init: str | None = Field(None, examples=["path/to/model"])
    """Weights to start from: a native checkpoint, a run, an HF folder or a Hub id. Give this or
    `spec`."""
    like: str | None = None
    """Preset or spec file whose sizes the weights at `init` have: a dry run takes its word where
    they are not on this disk, a run refuses others."""
    spec: Annotated[str | DepthConfig | None, BeforeValidator(_spec)] = None
    """Preset or spec file of a model with random weights, or {depth: N} for NanoChat's of N layers.
    Give this or `init`."""
    init_std: float | None = Field(None, ge=0)
    """Standard deviation of random weights; if absent, the spec's own."""
    depth_scaled: bool | None = None
    """Divide that of all that sublayers add to the residual stream by the root of their number; if
    absent, as the spec says."""
    override: OverrideConfig | None = None
    """What of the model changes on purpose without changing a weight, for long contexts."""

    @model_validator(mode="after")
    def _one(self) -> ModelConfig:
        if (self.init is None) == (self.spec is None):
            raise ValueError("give exactly one of init (weights) and spec (random weights)")
        if self.like is not None and self.init is None:
            raise ValueError(
                "like says what the weights at init are, but init is not given; drop like"
            )
        if self.spec is None and (self.init_std is not None or self.depth_scaled is not None):
            raise ValueError(
                "init_std and depth_scaled are for random weights, but init is given; drop them"
            )
        return self


class SourceConfig(Section):
    """A token store, or a file of labelled examples, and its share of the mixture."""

    path: str
    """A token store of `bevatron tokenize`; for objectives on examples a file of them (.jsonl,
    .parquet, .arrow), a folder that `datasets` saved, or a dataset on the Hub."""
    split: str | None = None
    """Of a dataset of several splits, the one that is meant; if absent, train."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples, relative to the others'."""
    parameters: dict[str, Any] = Field({})
    """Of a generator of problems, such as reasoning_gym:chain_sum: its own settings."""


class StageConfig(Section):
    """A mixture that takes over at a step. A store that was used before goes on where it was."""

    from_step: int = Field(ge=1)
    """The first step that reads this mixture."""
    train: list[SourceConfig] = Field(min_length=1)
    """The mixture, as `data.train`."""


class DataConfig(Section):
    """The token stores, or labelled examples, and how samples are cut out of them."""

    train: list[SourceConfig] = Field(min_length=1, examples=[[{"path": "tokens", "weight": 1.0}]])
    """The mixture from step 0 on."""
    stages: list[StageConfig] = Field([])
    """Later mixtures, in order."""
    validation: list[SourceConfig] = Field([])
    """Held-out stores, read in order, so every run sees the same."""
    seq_len: int = Field(gt=0, examples=[4096])
    """Tokens of a sample."""
    document_mask: bool = False
    """Tokens of a sample see their own document alone."""
    allow_other_tokenizer: bool = False
    """The stores need not be made with the model's tokenizer."""

    @model_validator(mode="after")
    def _ascending(self) -> DataConfig:
        steps = [stage.from_step for stage in self.stages]
        if steps != sorted(set(steps)):
            raise ValueError(f"stages begin at steps {steps}, expected ascending steps")
        return self

    def sources(self) -> list[SourceConfig]:
        """All that are named anywhere."""
        later = [source for stage in self.stages for source in stage.train]
        return [*self.train, *later, *self.validation]


class ParallelConfig(Section):
    """Sizes of the mesh, whose product is the number of processes. They change no number."""

    tp: int = Field(1, ge=1)
    """Tensor parallel: processes that share each layer."""
    pp: int = Field(1, ge=1)
    """Pipeline parallel: processes that share the layers."""
    dp_shard: int | None = Field(None, ge=1)
    """Data parallel processes that share out what `shard` says; if absent, what the other sizes
    leave of the processes."""
    dp_replicate: int = Field(1, ge=1)
    """Data parallel replicas of that."""
    cp: int = Field(1, ge=1)
    """Context parallel: processes that share each sequence."""
    sequence_parallel: bool = True
    """Processes of tp share out the sequence between the layers."""
    schedule: str = "1f1b"
    """Of the pipeline: 1f1b, gpipe, interleaved_1f1b, interleaved_zero_bubble or zbv."""
    virtual_stages: int | None = Field(None, ge=1)
    """Stages on every rank of an interleaved schedule; if absent 2. zbv always has 2."""
    split: list[int] | None = None
    """Layers per stage, in the order of the model; if absent, balanced in time and memory."""
    shard: Literal["full", "gradients"] = "full"
    """full: parameters too are shared out, and gathered for every use; gradients: gradients and
    optimizer state alone, parameters are gathered once per step."""


class TrainConfig(Section):
    """The loop. Batches are in samples of `data.seq_len` tokens."""

    steps: int = Field(ge=1, examples=[1000])
    """Updates of the whole run; reaching it saves."""
    global_batch: int = Field(ge=1, examples=[64])
    """Samples of a step."""
    micro_batch: int = Field(1, ge=1)
    """Samples that a process computes at a time."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of forward and backward. Masters, gradients' sums and the optimizer are fp32 in both."""
    recompute: Literal["none", "selective", "full"] = "none"
    """In the backward: none; selective keeps matrix products and computes the rest again; full
    keeps the input of each layer."""
    compile: bool = False
    """Compile each distinct layer once."""
    device: str | None = None
    """cpu, or the kind of this machine's accelerators, such as cuda; if absent, those, and the CPU
    where there are none that can train."""
    freeze: list[str] = Field([])
    """Parameters that are held still, by their native names, as in [embed.*, layers.0.*]; `*`
    stands for anything, `[0-7]` for one digit. They have no gradient, no moments and no masters,
    and are held in the dtype of `precision`."""
    seed: int = Field(0, ge=0)
    """Of random weights and the order of samples."""
    val_every: int | None = Field(None, ge=0)
    """Validate every so many steps, and at the start and the end; 0: never. If absent, 500 where
    there is `data.validation`."""
    val_batches: int | None = Field(None, ge=1)
    """At most so many batches of `global_batch` samples of each validation; if absent, all of
    `data.validation`, once."""


class MuonConfig(Section):
    """Muon's own settings."""

    momentum: Beta = 0.95
    """Nesterov momentum, after the warmup."""
    momentum_start: Beta = 0.85
    """Momentum of the first update."""
    momentum_warmup: int = Field(300, ge=0)
    """Updates over which it rises."""
    iterations: int = Field(5, ge=1)
    """Newton-Schulz iterations."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Of the iterations; if absent, `train.precision`."""
    scale: Literal["nanochat", "moonshot"] = "nanochat"
    """Of an update [rows, columns]: nanochat max(1, rows/columns)^0.5; moonshot 0.2 max(rows,
    columns)^0.5, which suits a rate and decay made for AdamW."""


class OptimizerConfig(Section):
    """How gradients become updates. A role is what a parameter does in the model, as `norm`."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon updates the layers' matrices with Muon and the rest (embedding, head, norms, biases,
    scores) with AdamW."""
    lr: float = Field(gt=0, examples=[3.0e-4])
    """The highest rate of the schedule."""
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)  # YAML gives a list
    """Of AdamW."""
    eps: float = Field(1e-8, gt=0)
    """Of AdamW."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled: an update multiplies by 1 - rate * weight_decay."""
    no_decay: list[Role] = Field(["norm", "embedding", "bias"])
    """Roles without weight decay."""
    lr_scale: dict[Role, Annotated[float, Field(gt=0)]] = Field({})
    """Multiples of the rate by role; roles that are not named have 1, with Muon NanoChat's."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient; 0: not clipped."""
    muon: MuonConfig = MuonConfig()
    """Muon's own settings."""


class ScheduleConfig(Section):
    """The learning rate: linear warmup, then down to `min_lr` at the last step."""

    name: Literal["cosine", "constant", "linear", "one_sqrt", "wsd"] = "cosine"
    """The way down: cosine, linear, one_sqrt (1 - sqrt of the way), constant (none), or wsd:
    constant, then `decay` at the end."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the rate rises to `optimizer.lr`."""
    min_lr: float = Field(0.0, ge=0)
    """Rate of the last update."""
    decay_steps: int | None = Field(None, ge=1)
    """wsd: updates of the decay; if absent, `decay_fraction` of `train.steps`."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """wsd: share of `train.steps` that decays."""
    decay: Literal["linear", "one_sqrt", "cosine"] = "linear"
    """wsd: shape of the decay."""


class CheckpointConfig(Section):
    """Which steps are saved, and which stay."""

    every: int = Field(EVERY, ge=0)
    """Save every so many steps, and at the end; 0: only at the end."""
    keep: int = Field(3, ge=1)
    """So many of the newest steps stay."""
    keep_every: int = Field(0, ge=0)
    """Steps that this divides stay as well; 0: none of these."""
    weights_every: int = Field(0, ge=0)
    """Save the weights alone every so many steps, into folders of their own that cannot be
    resumed; 0: never."""
    weights_keep: int = Field(0, ge=0)
    """So many of the newest of those stay; 0: all."""
    async_: bool | None = Field(None, alias="async")
    """Steps go on while a checkpoint is written from a copy in host memory; if absent, with an
    accelerator, whose state lies elsewhere than the copy."""
    export: str | None = None
    """A folder that gets the final model as Hugging Face has it."""


class SafetyConfig(Section):
    """What a run does about trouble. Decided before the optimizer sees a gradient, by numbers that
    are the same on all ranks, and recorded in metrics.jsonl as a line with an `event`."""

    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """A loss or gradient norm that is NaN or infinite: stop ends the run; skip drops the update
    (the step counts and its data is used up); rewind goes back to the weights of the newest saved
    step and passes over the data from there to here."""
    on_spike: Literal["ignore", "skip", "stop", "rewind"] = "ignore"
    """The same for a finite loss or norm more than `spike_sigma` standard deviations above the
    mean of the last `spike_window` updates; judged once half of them are there."""
    spike_sigma: float = Field(6.0, gt=0)
    """Standard deviations that make a spike."""
    spike_window: int = Field(128, ge=4)
    """Updates that a spike is measured by."""
    max_skips: int = Field(10, ge=0)
    """More skips than that among the last `spike_window` steps stop the run."""
    max_rewinds: int = Field(3, ge=0)
    """Of the whole run."""
    hang_timeout_s: float = Field(1800.0, ge=0)
    """When nothing moves for so many seconds, the run ends and names the rank that the others wait
    for; 0: never."""
    check_replicas_every: int = Field(0, ge=0)
    """Compare replicated parameters between ranks every so many steps; 0: never."""
    replay_every: int = Field(0, ge=0)
    """Compute a step's gradients twice every so many steps, which must be equal; 0: never."""

    @property
    def rewinds(self) -> bool:
        """Whether trouble may take the run back to a saved step."""
        return "rewind" in (self.on_nonfinite, self.on_spike)


class LogConfig(Section):
    """Where the numbers of a run go."""

    every: int = Field(1, ge=1)
    """metrics.jsonl has a line every so many steps."""
    tensorboard: bool = False
    """Send the same numbers to TensorBoard."""
    trackio: bool = False
    """Send the same numbers to trackio."""
    wandb: bool = False
    """Send the same numbers to Weights & Biases."""
    project: str = "bevatron"
    """The project in the trackers."""
    name: str | None = None
    """The run's name in them; if absent, its folder's."""
    peak_tflops: float | None = Field(None, gt=0)
    """What MFU is of, per device; if absent, the device's own."""


class BranchConfig(Section):
    """A step of another run, with its optimizer, master weights and position in the data."""

    run: str = Field(examples=["runs/other"])
    """The other run's folder."""
    step: int | None = Field(None, ge=1)
    """Which of its steps; if absent, its newest."""


class FolderConfig(Section):
    """The run's own place, and what it goes on from."""

    dir: str = Field(examples=["runs/my-run"])
    """The run's folder. One that holds a complete step is continued from its newest."""
    branch_from: BranchConfig | None = None
    """Begin in a new folder as the continuation of a step of another run, instead of at `model`.
    Every key may change there (`optimizer.name` with `--reset-optimizer`); the start says what each
    change does."""


class RecipeConfig(Section):
    """What a configuration says of itself, if it is a recipe; no run depends on it."""

    name: str
    """What `bevatron recipes` calls it."""
    what: str
    """A line on what it is for."""
    source: str | None = None
    """Where its numbers are published."""
    from_: str | None = Field(None, alias="from")
    """The preset of the model that is pruned or trained on; if absent, random weights."""
    world: int = Field(1, ge=1)
    """Processes that a dry run is of unless it is told otherwise."""


class PruneConfig(Section):
    """Sizes for `bevatron prune --recipe`, which makes the model that this run starts from. Each
    is the option of that name; an axis that is absent stays as it is."""

    hidden_size: int | None = Field(None, ge=1)
    """Channels of the residual stream."""
    intermediate_size: int | None = Field(None, ge=1)
    """Neurons of each MLP."""
    num_attention_heads: int | None = Field(None, ge=1)
    """Query heads; all KV heads stay."""
    num_layers: int | None = Field(None, ge=1)
    """How many layers stay."""
    drop_layers: str | None = None
    """Which layers go, counted from 0, such as 15-30 or 3,5."""


class RunConfig(Section):
    """The whole file."""

    recipe: RecipeConfig | None = None
    """What a recipe says of itself."""
    prune: PruneConfig | None = None
    """Sizes for `bevatron prune --recipe`."""
    model: ModelConfig
    """What to start from."""
    adapter: AdapterConfig | None = None
    """What is trained beside the model, which is held still; if absent, the model itself is
    trained."""
    tokenizer: str | None = None
    """A folder with tokenizer.json, or a Hub id; if absent, the model's own, where there is
    one."""
    objective: ObjectiveConfig = Field(default_factory=lambda: kind_of({}))
    """What is minimised."""
    data: DataConfig
    """What is read."""
    parallel: ParallelConfig = ParallelConfig()
    """The layout."""
    train: TrainConfig
    """The loop."""
    optimizer: OptimizerConfig
    """How gradients become updates."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is saved."""
    safety: SafetyConfig = SafetyConfig()
    """What is done about trouble."""
    log: LogConfig = LogConfig()
    """Where the numbers go."""
    run: FolderConfig
    """The run's own place."""

    @property
    def validates_every(self) -> int:
        """Steps between validations; 0 for none."""
        if not self.data.validation:
            return 0
        return EVERY if self.train.val_every is None else self.train.val_every

    def validation_samples(self, whole: int) -> int:
        """How many samples a validation takes, of `whole` in one pass over its data."""
        if not self.validates_every:
            return 0
        bound = self.train.val_batches
        return whole if bound is None else min(whole, bound * self.train.global_batch)

    @model_validator(mode="before")
    @classmethod
    def _by_depth(cls, raw: Any) -> Any:
        return filled(raw)

    @model_validator(mode="after")
    def _rewinds_have_a_target(self) -> RunConfig:
        if self.safety.rewinds and not self.checkpoint.every:
            raise ValueError(
                "safety asks for a rewind, which needs saved steps: set checkpoint.every"
            )
        return self

    @model_validator(mode="after")
    def _validation_has_data(self) -> RunConfig:
        if self.train.val_every and not self.data.validation:
            raise ValueError("train.val_every is set but data.validation is empty")
        return self

    @model_validator(mode="after")
    def _adapter_has_a_base(self) -> RunConfig:
        if self.adapter is not None and self.model.init is None:
            raise ValueError(
                "adapter needs weights to adapt, which its steps do not hold: give model.init"
            )
        return self

    @model_validator(mode="after")
    def _rates_fall(self) -> RunConfig:
        low, high = self.schedule.min_lr, self.optimizer.lr
        if low > high:
            raise ValueError(f"schedule.min_lr {low:g} is above optimizer.lr {high:g}")
        return self


def flat(config: RunConfig) -> dict[str, Any]:
    """The value of every dotted key; lists are values."""
    out: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)
        else:
            out[path] = value

    walk(config.model_dump(mode="json", by_alias=True), "")
    return out


def depth_lines(config: RunConfig) -> list[str]:
    """What `model.spec: {depth: N}` set of the configuration; nothing where there is no such."""
    dial = config.model.spec
    return told(dial, flat(config)) if isinstance(dial, DepthConfig) else []
