"""The parallel sizes of a run, and what they refuse. No torch: also used before paying for GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from bevatron.errors import BevatronError
from bevatron.spec import MLP, Attention, ModelSpec


class LayoutError(BevatronError):
    """A layout that this model or this number of processes cannot take."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh dimensions, outermost first. `tp` ranks are neighbours."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    sequence_parallel: bool = True
    schedule: str = "1f1b"
    split: tuple[int, ...] | None = None

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

    def __str__(self) -> str:
        sizes = {k: getattr(self, k) for k in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
        shown = " x ".join(f"{k} {v}" for k, v in sizes.items() if v > 1)
        return (shown or "one process") + (
            " + SP" if self.tp > 1 and self.sequence_parallel else ""
        )


def check(layout: Layout, spec: ModelSpec, *, seq_len: int, global_batch: int, micro: int) -> None:
    """Raise LayoutError if `spec` cannot run at `layout`; the message names the valid sizes."""
    for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp"):
        if getattr(layout, name) < 1:
            raise LayoutError(f"parallel.{name} is {getattr(layout, name)}, expected at least 1")
    if layout.cp > 1 and spec.head.kind != "causal_lm":
        raise LayoutError(
            f"parallel.cp={layout.cp} needs a model with a causal_lm head, whose loss is a sum "
            f"over tokens; this one has the head {spec.head.kind}; use cp: 1"
        )
    if layout.schedule != "1f1b":
        raise LayoutError(f"parallel.schedule {layout.schedule!r} is unknown; known are 1f1b")
    _check_tensor(layout, spec)
    _check_sequence(layout, seq_len)
    if global_batch % (layout.dp * micro):
        raise LayoutError(
            f"train.global_batch={global_batch} is not a multiple of data-parallel ranks "
            f"{layout.dp} times micro_batch {micro}; use a global batch that is a multiple of "
            f"{layout.dp * micro}, or another micro_batch"
        )
    steps = global_batch // (layout.dp * micro)
    if steps < layout.pp:
        raise LayoutError(
            f"pp={layout.pp} needs at least {layout.pp} micro-batches per step, there are {steps}; "
            "use a smaller micro_batch, fewer data-parallel ranks or a larger global_batch"
        )


def check_documents(spec: ModelSpec, seq_len: int) -> None:
    """Raise LayoutError if documents packed into sequences of `seq_len` would not be computed as
    they are apart."""
    rope, context = spec.rope, spec.rope.original_max_position_embeddings or 0
    if rope.kind == "dynamic" and seq_len > context:
        raise LayoutError(
            f"data.document_mask: the rope of this model is dynamic, so beyond {context} tokens a "
            f"document's rotation depends on its length, and documents of one sequence (seq_len="
            f"{seq_len}) share a rotation; use data.seq_len: {context} or no document mask"
        )


def _check_tensor(layout: Layout, spec: ModelSpec) -> None:
    tp = layout.tp
    if tp == 1:
        return
    for i, layer in enumerate(spec.layers):
        if isinstance(layer.attention, Attention) and layer.attention.num_attention_heads % tp:
            heads = layer.attention.num_attention_heads
            sizes = [n for n in range(1, heads + 1) if heads % n == 0 and n <= 4 * tp]
            raise LayoutError(
                f"layers.{i}.attention has {heads} query heads, which tp={tp} does not divide; "
                f"use tp={' or '.join(map(str, sizes))}"
            )
        if isinstance(layer.mlp, MLP):
            _check_cut(f"layers.{i}.mlp: intermediate_size", layer.mlp.intermediate_size, tp)
    _check_cut("hidden_size", spec.hidden_size, tp)
    _check_cut("vocab_size", spec.vocab_size, tp)


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


def _check_cut(what: str, size: int, tp: int) -> None:
    """Every rank must hold something of a dimension that is cut with rounding up."""
    if -(-size // tp) * (tp - 1) >= size:
        raise LayoutError(f"{what} {size} leaves a rank of tp={tp} with nothing; use a smaller tp")
