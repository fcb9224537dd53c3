"""What a run would be, without starting it."""

from __future__ import annotations

from bevatron.parallel.layout import Layout
from bevatron.parallel.split import layer_cost, stage_ranges
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.rules import groups

# Bytes per parameter of a rank: fp32 master, fp32 gradient and two fp32 moments.
STATE_BYTES = 16


def report(config: RunConfig, layout: Layout) -> None:
    """Print the layout, the stage split, and parameters and state bytes per rank."""
    from bevatron.train.start import find_start

    start = find_start(config)
    spec = start.spec
    total = sum(p.numel for p in spec.parameters())
    tokens = config.train.global_batch * config.data.seq_len
    micro = config.train.global_batch // (layout.dp * config.train.micro_batch)
    origin = start.resumed or config.model.init or f"random weights ({config.model.spec})"
    print(f"model       {start.family}, {total:,} parameters, {len(spec.layers)} layers")
    print(f"start       {origin}")
    print(f"layout      {layout}: {layout.world_size} processes")
    print(
        f"batch       {config.train.global_batch} samples, {tokens:,} tokens, {micro} micro-batches"
    )
    print(f"steps       {config.train.steps}, {config.train.steps * tokens:,} tokens in all")
    for group in groups(spec, config.optimizer):
        print(f"optimizer   {group}")
    print("stage  layers       parameters/rank  state GiB/rank  share of FLOPs")
    costs = [layer_cost(spec, i, config.data.seq_len) for i in range(len(spec.layers))]
    head = 2.0 * spec.head_rows * spec.hidden_size
    stages = stage_ranges(
        spec,
        layout,
        config.data.seq_len,
        micro_batch=config.train.micro_batch,
        recompute=config.train.recompute,
    )
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        own = stage_parameters(spec, stage, first=number == 0, last=last)
        per_rank = own / (layout.tp * layout.shards)
        flops = sum(costs[i] for i in stage) + (head if last else 0.0)
        share = flops / (sum(costs) + head)
        shown = f"{stage.start}-{stage.stop - 1}" if len(stage) else "none"
        gib = per_rank * STATE_BYTES / 2**30
        print(f"{number:<6} {shown:<12} {per_rank:>15,.0f}  {gib:>14.2f}  {share:>14.1%}")


def stage_parameters(spec: ModelSpec, stage: range, *, first: bool, last: bool) -> int:
    """Parameters that a stage holds; a tied head on its own stage is a second copy."""
    count = sum(p.numel for i in stage for p in spec.layer_parameters(i))
    embedding = spec.vocab_size * spec.hidden_size
    count += embedding if first else 0
    if last:
        count += sum(p.numel for p in spec.norm.parameters("final_norm", spec.hidden_size))
        count += 0 if spec.tied and first else spec.head_rows * spec.hidden_size
    return count
