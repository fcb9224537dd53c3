"""What a run of any size would be, without starting it: `bevatron train CONFIG --dry-run`.

The mesh, the stages and the placement are built by the same code as in a run, but on a world on
paper (`parallel/fake_world.py`) and with tensors that have shapes and no memory. This is done once
per pipeline rank, as the first of the ranks at this place of the pipeline. A model that cannot be
placed is refused with the error that the run would give.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from bevatron.checkpoint.rank_boxes import local
from bevatron.nn.vocabulary_loss import CHUNK_LOGITS
from bevatron.parallel import memory_footprint
from bevatron.parallel.fake_world import paper_mesh, paper_world
from bevatron.parallel.layout import Layout
from bevatron.parallel.placement import Placed
from bevatron.parallel.process_groups import mesh
from bevatron.parallel.stage_split import end_loads, in_flight, layer_cost, layer_load, stage_ranges
from bevatron.spec import ModelSpec
from bevatron.spec.count import describe_adapter, forward_flops_per_token, parameter_count
from bevatron.train.config import RunConfig, depth_lines
from bevatron.train.freezing import (
    describe,
    first_trained_layer,
    frozen_parameters,
    training_flops,
)
from bevatron.train.objectives import Objective
from bevatron.train.optimizer_and_schedule import groups
from bevatron.train.run_start import Start, find_start
from bevatron.train.trainer import Trainer

GIB = 2**30


@dataclass(frozen=True)
class StagePlan:
    """The first rank of one place in the pipeline. Bytes are this rank's.

    Attributes:
        stage: its place, and `layers` those of all of its stages.
        parameters_per_rank: elements of its shards, exact.
        weights, optimizer: bytes of its shards, a teacher's among them, and of the optimizer's
            states, exact.
        gradients: see `footprint.gradient_bytes`.
        gathered: weights in the run's precision, as they are used.
        activations: estimate, of all micro-batches in flight.
        head: estimate, what the last stage's loss holds.
        beside: what a teacher's forward leaves until the end of the step: hidden states of all
            tokens on the last stage, weights that stay gathered; exact.
        engine: of a feed that answers: its engine's weights, exact.
        cache: and the engine's cache when it is full, which is there between steps alone.
        flops: share of a step's forward and backward, what is recomputed and a teacher's forward
            included.
    """

    stage: int
    layers: list[int]
    parameters: int
    parameters_per_rank: int
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    in_flight: float
    activations: int
    head: int
    beside: int
    engine: int
    cache: int
    flops: float

    @property
    def state(self) -> int:
        """Bytes that are there between steps."""
        return self.weights + self.optimizer + self.engine

    @property
    def peak(self) -> int:
        used = self.gradients + self.gathered + self.activations + self.head
        return self.state + max(used + self.beside, self.cache)


@dataclass(frozen=True)
class Plan:
    """A whole run on paper. `flops_per_step` includes those of a teacher's forward, which
    `teacher_flops_per_step` are, or of another frozen model's: `companions` names what there is;
    `depth`: what `model.spec: {depth: N}` set; `busy`: share of a step in which the average rank
    has work, from the bubble and the heaviest stage alone."""

    model: str
    start: str
    parameters: int
    layers: int
    layout: str
    ranks: int
    micro_batches: int
    tokens_per_step: int
    steps: int
    flops_per_step: int
    teacher_flops_per_step: int
    companions: list[str]
    schedule: str
    bubble: float
    imbalance: float
    stages: list[StagePlan]
    optimizer: list[str]
    adapter: str
    frozen: str
    depth: list[str]
    warnings: list[str]
    seconds: float

    @property
    def busy(self) -> float:
        return (1 - self.bubble) / self.imbalance

    def to_dict(self) -> dict[str, Any]:
        out = dataclasses.asdict(self) | {"busy": self.busy}
        for stage, row in zip(self.stages, out["stages"], strict=True):
            row |= {"state": stage.state, "peak": stage.peak}
        return out


def make_plan(config: RunConfig, layout: Layout, objective: Objective, warnings: list[str]) -> Plan:
    """Place every stage on paper. Raises what a real start would."""
    began = time.perf_counter()
    start = find_start(config)
    spec, train = start.spec, config.train
    held = frozen_parameters(spec, train.freeze)
    sequences = train.micro_batch * objective.rows  # of a micro-batch
    micro_batches = train.global_batch // (layout.dp * train.micro_batch)
    times = _times(config, spec, layout, held, sequences)
    frozen = [c.spec for c in objective.companions.values()]
    whole = sum(times) + sum(sum(_forward_times(other, config)) for other in frozen)
    ranges = stage_ranges(
        spec,
        layout,
        config.data.seq_len,
        micro_batch=sequences,
        recompute=train.recompute,
    )
    split = [len(layers) for layers in ranges]
    layout = dataclasses.replace(layout, split=tuple(split))  # balanced once, not once per stage
    column = layout.world_size // layout.pp
    stages = []
    for number in range(layout.pp):
        with paper_world(layout.world_size, number * column):
            cpu = torch.device("cpu")
            seen = paper_mesh(layout) if number else mesh(layout, cpu)
            trainer = _trainer(config, start, layout, seen, objective)
            feed = config.objective.feed.memory(config, spec, number * column, layout.world_size)
            stages.append(_stage(trainer, config, micro_batches, times, whole, feed))
    tokens = train.global_batch * objective.rows * config.data.seq_len
    flops = [s.flops for s in stages]
    seq_len = config.data.seq_len
    teachers = tokens * sum(forward_flops_per_token(s, seq_len, causal=True) for s in frozen)
    return Plan(
        model=start.family,
        start=str(start.resumed or config.model.init or f"random weights, {config.model.spec}"),
        parameters=parameter_count(spec.base),
        layers=len(spec.layers),
        layout=str(layout),
        ranks=layout.world_size,
        micro_batches=micro_batches,
        tokens_per_step=tokens,
        steps=train.steps,
        flops_per_step=tokens * sum(training_flops(spec, seq_len, True, held)) + teachers,
        teacher_flops_per_step=teachers,
        companions=list(objective.companions),
        schedule=layout.schedule,
        bubble=memory_footprint.bubble(layout, micro_batches),
        imbalance=max(flops) * len(flops),
        stages=stages,
        optimizer=[str(group) for group in groups(spec, config.optimizer, held)],
        adapter=describe_adapter(spec) if spec.adapter is not None else "",
        frozen=describe(spec, held) if held else "",
        depth=[] if start.resumed else depth_lines(config),
        warnings=warnings,
        seconds=time.perf_counter() - began,
    )


def _times(
    config: RunConfig, spec: ModelSpec, layout: Layout, frozen: Collection[str], sequences: int
) -> list[float]:
    """FLOPs per token of each layer in a step of micro-batches of so many sequences, and the
    head's, last."""
    seq_len, tokens = config.data.seq_len, sequences * config.data.seq_len
    again = config.train.recompute
    times = [
        layer_load(spec, i, layout, seq_len, tokens, again).time for i in range(len(spec.layers))
    ]
    times.append(end_loads(spec, layout, tokens)[1].time)
    if not frozen:
        return times
    less, full = (training_flops(spec, seq_len, True, names) for names in (frozen, ()))
    return [time * a / b if b else time for time, a, b in zip(times, less, full, strict=True)]


def _forward_times(spec: ModelSpec, config: RunConfig) -> list[float]:
    """`_times` of a model that is not trained."""
    times = [layer_cost(spec, i, config.data.seq_len) for i in range(len(spec.layers))]
    return [*times, 2.0 * spec.head_rows * spec.hidden_size]


def _mine(placed: Placed, times: list[float]) -> float:
    """Of these times those of this rank."""
    layers = sum(times[i] for n in placed.mine for i in placed.stages[n])
    return layers + (times[-1] if placed.is_last else 0.0)


def _trainer(
    config: RunConfig, start: Start, layout: Layout, seen: DeviceMesh, objective: Objective
) -> Trainer:
    """This rank's trainer, of tensors without memory."""
    return Trainer(
        start.spec,
        layout,
        seen,
        objective,
        seq_len=config.data.seq_len,
        train=config.train,
        optimizer=config.optimizer,
        device=torch.device("meta"),
    )


def _stage(
    trainer: Trainer,
    config: RunConfig,
    micro_batches: int,
    times: list[float],
    whole: float,
    feed: tuple[int, int],
) -> StagePlan:
    """`whole`: the times of all that is computed for a token, by all ranks; `feed`: what the feed
    takes, see `Feed.memory`."""
    placed, layout, spec, train = trainer.placed, trainer.layout, trainer.spec, config.train
    parameters = dict(placed.parameters)
    trained = {n: p for n, p in placed.trained.items() if n in parameters}
    if placed.tied is not None and placed.tied.head is not None:
        parameters["head.weight"] = placed.tied.head  # a copy of the embedding
        if placed.tied.head.requires_grad:
            trained["head.weight"] = placed.tied.head
    itemsize = 4 if train.precision == "fp32" else 2
    sequences = train.micro_batch * trainer.objective.rows
    tokens = sequences * config.data.seq_len // layout.cp
    flights = [
        micro_batches if layout.schedule == "gpipe" else min(n, micro_batches)
        for n in in_flight(layout)
    ]

    first = first_trained_layer(spec, trainer.frozen)

    def kept(i: int, recompute: str) -> float:
        if i < first:
            return 0.0
        return memory_footprint.layer_activations(spec, i, layout, itemsize, recompute)

    per_token = sum(
        flights[n] * kept(i, train.recompute) for n in placed.mine for i in placed.stages[n]
    )
    layers = [i for n in placed.mine for i in placed.stages[n]]
    if train.recompute != "none":  # one layer at a time is there in full again
        per_token += max((kept(i, "none") for i in layers), default=0.0)
    weights = memory_footprint.local_bytes(list(parameters.values()))
    companions = list(trainer.objective.companions.values())
    frozen = sum(companion.held_bytes() for companion in companions)
    forward = sum(_mine(c.placed, _forward_times(c.spec, config)) for c in companions)
    states = {id(state): state for _, state in trainer.optimizer.states().values()}
    head = memory_footprint.head_bytes(spec, layout, tokens, itemsize, CHUNK_LOGITS)
    return StagePlan(
        stage=placed.mesh.get_local_rank("pp"),
        layers=layers,
        parameters=sum(p.numel() for p in parameters.values()),
        parameters_per_rank=sum(local(p.detach()).numel() for p in parameters.values()),
        weights=weights + frozen,
        gradients=memory_footprint.gradient_bytes(trained, spec, layout, itemsize, micro_batches),
        optimizer=sum(s.numel() * s.element_size() for s in states.values()),
        gathered=itemsize * memory_footprint.gathered_elements(parameters, layout.regathers),
        in_flight=sum(flights[n] for n in placed.mine),
        activations=int(tokens * per_token),
        head=int(head) if placed.is_last else 0,
        beside=sum(c.kept_bytes(micro_batches * tokens) for c in companions),
        engine=feed[0],
        cache=feed[1],
        flops=(_mine(placed, times) + forward) / whole,
    )


def to_text(plan: Plan) -> str:
    """The plan as people read it."""
    last = plan.stages[-1].stage
    heaviest = max(plan.stages, key=lambda s: s.peak)
    state = sum(s.state for s in plan.stages)
    teacher, beside = plan.teacher_flops_per_step / plan.flops_per_step, _beside(plan)
    lines = [
        f"model       {plan.model}, {plan.parameters:,} parameters, {plan.layers} layers",
        f"start       {plan.start}",
        *(f"depth       {line}" for line in plan.depth),
        f"layout      {plan.layout}: {plan.ranks:,} processes",
        f"batch       {plan.tokens_per_step:,} tokens, {plan.micro_batches} micro-batches per rank",
        f"steps       {plan.steps:,}, {plan.steps * plan.tokens_per_step:,} tokens in all",
        *(f"optimizer   {group}" for group in plan.optimizer),
        *([f"adapter     {plan.adapter}"] if plan.adapter else []),
        *([f"frozen      {plan.frozen}"] if plan.frozen else []),
        f"compute     {plan.flops_per_step / 1e15:,.1f} PFLOP per step, "
        f"{plan.flops_per_step / plan.ranks / 1e12:,.1f} TFLOP per rank (causal, no recompute)"
        + (f", {teacher:.1%} of it the {beside}'s" if teacher else ""),
    ]
    if last:
        lines.append(
            f"pipeline    {plan.schedule}: bubble {plan.bubble:.1%}, heaviest rank "
            f"{plan.imbalance:.2f} x the mean, so ranks are busy {plan.busy:.1%} at best"
        )
    lines += [
        f"memory      at most {heaviest.peak / GIB:.1f} GiB per rank (pipeline rank "
        f"{heaviest.stage}), of which {heaviest.state / GIB:.1f} GiB stay between steps",
        *_engine(plan),
        "",
        *_table(plan),
        "",
        "GiB per rank, for the first rank at each place of the pipeline. weights, gradients,",
        "optimizer, gathered: exact; activations (of what is in flight), head: estimated, eager.",
        *([f"{beside}: what its forward leaves until a step ends, exact."] if teacher else []),
        f"{state / GIB:,.1f} GiB of state on one pipeline. Nothing was started.",
    ]
    return "\n".join([*lines, *(f"warning: {w}" for w in plan.warnings)])


def _beside(plan: Plan) -> str:
    """What runs beside the trained model, in a word or two: teacher, reference."""
    return " and ".join(plan.companions)


def _engine(plan: Plan) -> list[str]:
    """What answers take, if a run makes some."""
    most = max(plan.stages, key=lambda s: s.engine + s.cache)
    if not most.engine:
        return []
    return [
        f"engine      {most.engine / GIB:.2f} GiB of weights per rank, which stay between steps; "
        f"while it answers {most.cache / GIB:.2f} GiB of cache",
        "            (both are in the peak; computing the answers is not in the PFLOP)",
    ]


HEADER = (
    "rank   layers     parameters/rank  weights  gradients  optimizer  gathered  "
    "activations   head   peak  in flight  FLOPs"
)


def _table(plan: Plan) -> list[str]:
    taught = plan.teacher_flops_per_step > 0
    name = f"{_beside(plan):>7}"
    rows = [HEADER.replace("   head", f"   head  {name}") if taught else HEADER]
    for s in plan.stages:
        gib = [s.weights, s.gradients, s.optimizer, s.gathered, s.activations, s.head, s.peak]
        w, g, o, a, x, h, p = (f"{n / GIB:.2f}" for n in gib)
        beside = f"{s.beside / GIB:>{len(name)}.2f}  " if taught else ""
        rows.append(
            f"{s.stage:<6} {_ranges(s.layers):<9} {s.parameters_per_rank:>16,}  {w:>7}  {g:>9}  "
            f"{o:>9}  {a:>8}  {x:>11}  {h:>5}  {beside}{p:>5}  {s.in_flight:>9g}  {s.flops:>5.1%}"
        )
    return rows


def _ranges(numbers: list[int]) -> str:
    """`0-3,8`, or `none`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"
