"""The parallel sizes of a run, and the checks on them.

No torch is needed, so a layout can be checked on any machine before GPUs are rented.
"""

from __future__ import annotations

from dataclasses import dataclass

from bevatron.errors import BevatronError
from bevatron.spec import ModelSpec
from bevatron.spec.sublayer import uneven_cut

# Pipeline schedules by name, and how many stages a rank has if nothing is said.
SCHEDULES = {"1f1b": 1, "gpipe": 1, "interleaved_1f1b": 2, "interleaved_zero_bubble": 2, "zbv": 2}
INTERLEAVED = ("interleaved_1f1b", "interleaved_zero_bubble")
# Those that split a stage's backward in two, with respect to its input and to its weights.
ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv")
SHARD_MODES = ("full", "gradients")


class LayoutError(BevatronError):
    """A layout that this model or this number of processes cannot take."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh dimensions, outermost first, and how they are used. `tp` ranks are
    neighbours.

    Attributes:
        schedule: one of SCHEDULES; without meaning at pp 1.
        virtual_stages: stages per rank of an interleaved schedule; None for its default.
        split: layers per stage in stage order; None balances them.
        shard: what ranks of dp_shard share out. `full`: parameters too, which are gathered for
            every use. `gradients`: gradients and optimizer state; parameters are gathered once
            per step. A pipeline keeps them gathered during a step in any case.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    sequence_parallel: bool = True
    schedule: str = "1f1b"
    split: tuple[int, ...] | None = None
    virtual_stages: int | None = None
    shard: str = "full"

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Ranks that FSDP cuts a parameter (a tensor-parallel rank's part of it) over."""
        return self.dp_shard * self.cp

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages that every rank of `pp` runs."""
        if self.pp == 1:
            return 1
        interleaved = self.schedule in INTERLEAVED and self.virtual_stages
        return interleaved or SCHEDULES[self.schedule]

    @property
    def num_stages(self) -> int:
        return self.pp * self.stages_per_rank

    @property
    def regathers(self) -> bool:
        """Whether parameters are dropped after their use in a forward and gathered again.

        Not under a pipeline, which would gather them once per micro-batch and stage (and whose
        zero-bubble schedules would silently lose gradients), nor over one rank, where nothing
        would be saved."""
        return self.pp == 1 and self.shards > 1 and self.shard == "full"

    def rank_of_stage(self, stage: int) -> int:
        """The `pp` coordinate that runs a stage: round and round, with zbv down and up again."""
        if self.schedule == "zbv" and stage >= self.pp:
            return self.num_stages - 1 - stage
        return stage % self.pp

    def stages_of_rank(self, rank: int) -> list[int]:
        """The stages of a `pp` coordinate, in model order."""
        return [s for s in range(self.num_stages) if self.rank_of_stage(s) == rank]

    def __str__(self) -> str:
        sizes = {k: getattr(self, k) for k in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
        shown = " x ".join(f"{k} {v}" for k, v in sizes.items() if v > 1) or "one process"
        if self.pp > 1 and self.schedule != "1f1b":
            shown += f" {self.schedule}"
            shown += f" ({self.stages_per_rank} stages)" if self.schedule in INTERLEAVED else ""
        if self.dp_shard > 1 and self.shard != "full":
            shown += f" shard {self.shard}"
        return shown + (" + SP" if self.tp > 1 and self.sequence_parallel else "")


def check(
    layout: Layout,
    spec: ModelSpec,
    *,
    seq_len: int,
    global_batch: int,
    micro: int,
    recompute: str = "none",
    compiled: bool = False,
    trained: bool = True,
) -> None:
    """Raise LayoutError if `spec` cannot run at `layout`; the message names the valid sizes.

    Args:
        recompute, compiled: as in the configuration's section `train`.
        trained: whether it has a loss; else it is a model that runs beside another one."""
    for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp"):
        if getattr(layout, name) < 1:
            raise LayoutError(f"parallel.{name} is {getattr(layout, name)}, expected at least 1")
    if trained and layout.cp > 1 and spec.head.kind != "causal_lm":
        raise LayoutError(
            f"parallel.cp={layout.cp} needs a model with a causal_lm head, whose loss is a sum "
            f"over tokens; this one has the head {spec.head.kind}; use cp: 1"
        )
    if layout.shard not in SHARD_MODES:
        raise LayoutError(
            f"parallel.shard is {layout.shard!r}, expected {' or '.join(SHARD_MODES)}"
        )
    _check_schedule(layout, recompute, compiled)
    _check_tensor(layout, spec)
    _check_sequence(layout, seq_len)
    if global_batch % (layout.dp * micro):
        raise LayoutError(
            f"train.global_batch={global_batch} is not a multiple of data-parallel ranks "
            f"{layout.dp} times micro_batch {micro}; use a global batch that is a multiple of "
            f"{layout.dp * micro}, or another micro_batch"
        )
    if layout.pp > 1:
        _check_micro_batches(layout, global_batch // (layout.dp * micro))


def _check_schedule(layout: Layout, recompute: str, compiled: bool) -> None:
    name, virtual = layout.schedule, layout.virtual_stages
    if name not in SCHEDULES:
        raise LayoutError(f"parallel.schedule is {name!r}, expected one of {', '.join(SCHEDULES)}")
    if virtual is not None and (
        virtual < 1 or (name not in INTERLEAVED and virtual != SCHEDULES[name])
    ):
        fixed = f"always {SCHEDULES[name]}, or leave it out"
        raise LayoutError(
            f"parallel.virtual_stages is {virtual}, expected "
            f"{'at least 1' if name in INTERLEAVED else fixed}, with schedule {name}; only "
            f"{' and '.join(INTERLEAVED)} have a choice"
        )
    if layout.pp > 1 and name in ZERO_BUBBLE and (compiled or recompute == "selective"):
        what, instead = "train.compile", "compile: false"
        if not compiled:
            what, instead = "train.recompute: selective", "recompute: none or full"
        raise LayoutError(
            f"{what} cannot be used with parallel.schedule {name}, which runs the backward of a "
            f"layer in two parts; use {instead}, or schedule 1f1b or interleaved_1f1b"
        )


def _check_micro_batches(layout: Layout, count: int) -> None:
    """What a schedule asks of the number of micro-batches per step and data-parallel rank."""
    if layout.schedule == "1f1b" and count < layout.pp:
        raise LayoutError(
            f"pp={layout.pp} needs at least {layout.pp} micro-batches per step with schedule 1f1b, "
            f"there are {count}; use a smaller micro_batch, fewer data-parallel ranks or a larger "
            "global_batch"
        )
    if layout.schedule in INTERLEAVED and not in_rounds(count, layout.pp):
        fewer = next(n for n in range(count, 0, -1) if in_rounds(n, layout.pp))
        more = next(n for n in range(count, 2 * count + layout.pp) if in_rounds(n, layout.pp))
        raise LayoutError(
            f"schedule {layout.schedule} at pp={layout.pp} runs its micro-batches in "
            f"{count // layout.pp} rounds, which {count} micro-batches do not fill; use {fewer} or "
            f"{more} per step (any multiple of {layout.pp}) through global_batch or micro_batch"
        )


def in_rounds(count: int, pp: int) -> bool:
    """Whether an interleaved schedule can run `count` micro-batches: in equal rounds of at least
    `pp`, or all in one."""
    return count % max(1, count // pp) == 0


def check_documents(spec: ModelSpec, seq_len: int, key: str = "data.document_mask") -> None:
    """Raise LayoutError if documents packed into sequences of `seq_len`, as `key` says, would not
    be computed as they are apart."""
    rope, context = spec.rope, spec.rope.original_max_position_embeddings or 0
    if rope.kind == "dynamic" and seq_len > context:
        raise LayoutError(
            f"{key}: the rope of this model is dynamic, so beyond {context} tokens a "
            f"document's rotation depends on its length, and documents of one sequence (seq_len="
            f"{seq_len}) share a rotation; use data.seq_len: {context}, or drop {key}"
        )


def _check_tensor(layout: Layout, spec: ModelSpec) -> None:
    tp = layout.tp
    if tp == 1:
        return
    problems = [
        sublayer.cut_problem(f"layers.{i}.{place}", tp)
        for i, layer in enumerate(spec.layers)
        for place, sublayer in layer.present
    ]
    problems += [
        uneven_cut(name, size, tp)
        for name, size in (("hidden_size", spec.hidden_size), ("vocab_size", spec.vocab_size))
    ]
    if found := next((p for p in problems if p is not None), None):
        raise LayoutError(found)


def _check_sequence(layout: Layout, seq_len: int) -> None:
    """Context parallel cuts a sequence into two chunks per rank, sequence parallel those of a rank
    by tp."""
    tp = layout.tp if layout.sequence_parallel else 1
    if layout.cp > 1 and seq_len % (unit := 2 * layout.cp * tp):
        wanted = f"2 x cp {layout.cp}" + (f" x tp {tp}" if tp > 1 else "")
        below, above = seq_len // unit * unit, -(-seq_len // unit) * unit
        raise LayoutError(
            f"data.seq_len={seq_len} is not a multiple of {unit} ({wanted}), which context "
            f"parallelism needs; use {f'{below} or ' if below else ''}{above}, or another cp"
        )
    if seq_len % tp:
        raise LayoutError(
            f"data.seq_len={seq_len} is not a multiple of tp={tp}, which sequence parallelism "
            "needs; change seq_len or set parallel.sequence_parallel: false"
        )
