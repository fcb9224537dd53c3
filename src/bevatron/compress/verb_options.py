"""The options of `importance` and `search`, as dataclasses.

Their command lines follow from these, and so does the record of a search's options. This file
imports neither numpy nor torch, because the help is made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from bevatron.compress.prune_targets import parse_count, parse_share, parse_sizes
from bevatron.option import Option

TOLERANCE = 0.05  # of a target parameter count, as in Minitron's search (arXiv 2407.14679)
MAX_CANDIDATES = 18  # Minitron's spaces had 15 and 18 (the same, section 4.3)

Samples = Annotated[int, Option("How many to look at.", min=1)]
SequenceLength = Annotated[
    int | None, Option("Tokens of one; default: 2048 or the context.", min=1)
]
Dtype = Annotated[str | None, Option("bf16, fp16 or fp32; default: as stored.")]


@dataclass(frozen=True)
class Processes:
    """Of the layout; what is left of the processes is data-parallel."""

    tp: Annotated[int, Option("Processes that share each layer.", min=1)] = 1
    pp: Annotated[int, Option("Processes that share the layers.", min=1)] = 1
    dp_shard: Annotated[
        int | None, Option("Processes that share parameters; default: the rest.", min=1)
    ] = None
    nproc: Annotated[int | None, Option("Processes to start here.", min=1)] = None


@dataclass(frozen=True)
class Measuring:
    """How importance is measured.

    Attributes:
        seq_len: tokens of a sample; 2,048 or the model's context, if shorter.
        aggregation: `batch,sequence` of mean, l2 and var.
        layers: `bi` for block influence alone; `loss` for the loss without each layer besides;
            `spans` for the loss without each contiguous span of so many layers as `spans` says,
            a quarter and a half of them by default. These take a pass per layer or span, over the
            first `loss_samples` samples.
        dtype: bf16, fp16 or fp32 to compute in; as stored if absent.
    """

    samples: Samples = 1024
    seq_len: SequenceLength = None
    aggregation: Annotated[
        str, Option("Over samples and over the sequence: mean, l2 or var each.")
    ] = "l2,mean"
    layers: Annotated[
        str, Option("bi, or also the loss without each layer (loss) or span (spans).")
    ] = "bi"
    spans: Annotated[
        tuple[int, ...],
        Option("Layers of a span; may be given several times.", name="--span", min=1),
    ] = ()
    loss_samples: Annotated[int, Option("Samples for losses.", min=1)] = 128
    dtype: Dtype = None
    seed: Annotated[int, Option("Of the choice of samples.", min=0)] = 0


@dataclass(frozen=True)
class Goal:
    """What a candidate is.

    Attributes:
        params: of a candidate, at most the share `within` more or fewer.
        multiple: of the default grid's widths; `depth_by`: see `Targets`.
        max_candidates: how many stay, the nearest to `params`.
    """

    params: Annotated[int, Option("Of a candidate, such as 4B.", read=parse_count)]
    within: Annotated[
        float, Option("How far from --params.", read=partial(parse_share, "--within"), shown="5%")
    ] = TOLERANCE
    multiple: Annotated[int, Option("Of widths where none are given.")] = 64
    depth_by: Annotated[
        str, Option("influence, loss, or span (neighbours) decides which layers go.")
    ] = "influence"
    max_candidates: Annotated[int, Option("The nearest to --params stay.", min=1)] = MAX_CANDIDATES


@dataclass(frozen=True)
class Axes:
    """Values to try; None: the default grid (`search_space.grid`)."""

    num_layers: Annotated[
        tuple[int, ...] | None,
        Option("To try, such as 29,30,32.", read=partial(parse_sizes, "--num-layers")),
    ] = None
    num_attention_heads: Annotated[
        tuple[int, ...] | None,
        Option("To try.", read=partial(parse_sizes, "--num-attention-heads")),
    ] = None
    hidden_size: Annotated[
        tuple[int, ...] | None,
        Option("To try, such as 3072,3584,4096.", read=partial(parse_sizes, "--hidden-size")),
    ] = None
    intermediate_size: Annotated[
        tuple[int, ...] | None,
        Option("To try.", read=partial(parse_sizes, "--intermediate-size")),
    ] = None


@dataclass(frozen=True)
class Comparison:
    """How candidates are compared.

    Attributes:
        data: token stores for importance and distillation; `validation`: held-out ones.
        scores: of `bevatron importance`; measured on `samples` samples if absent.
        seq_len: tokens of a sample; `val_samples`: of held-out text per loss.
        steps, short: of the short distillation, and how many candidates get it; `long_steps`,
            `long`: of the longer one. 0 steps: the stage is left out.
        overrides: `section.key=value` of the distillations' configuration.
        keep: delete no weights.
    """

    overrides: Annotated[
        tuple[str, ...],
        Option(
            "Of the distillations' configuration, such as optimizer.lr=1e-4.",
            words="section.key=value",
        ),
    ] = ()
    data: Annotated[
        tuple[Path, ...],
        Option("Token store for importance and distillation; may be given several times."),
    ] = ()
    validation: Annotated[
        tuple[Path, ...],
        Option("Held-out token store, which decides; may be given several times."),
    ] = ()
    scores: Annotated[
        Path | None, Option("File of `bevatron importance`; default: measured first.")
    ] = None
    samples: Annotated[int, Option("For importance.", min=1)] = 1024
    seq_len: SequenceLength = None
    val_samples: Annotated[int, Option("Held-out ones per loss.", min=1)] = 128
    steps: Annotated[
        int, Option("Of the short distillation; 0: prune and compare only.", min=0)
    ] = 400
    short: Annotated[int, Option("How many candidates get it.", min=1)] = 8
    long_steps: Annotated[
        int, Option("Of a longer distillation, from the pruned weights again.", min=0)
    ] = 0
    long: Annotated[int, Option("How many candidates get it.", min=1)] = 2
    dtype: Dtype = None
    seed: Annotated[int, Option(min=0)] = 0
    keep: Annotated[bool, Option("Keep the weights of all candidates.")] = False


@dataclass(frozen=True)
class SearchOptions(Processes, Comparison, Axes, Goal):
    """What a search is asked for."""
