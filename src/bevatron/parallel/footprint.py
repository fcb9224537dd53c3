"""What a placed stage will take on its device: bytes counted where tensors exist, estimated where
they do not yet.

Weights, gradients, optimizer and gathered weights are read off the placed parameters, so they are
exact. Activations are a formula, after Korthikanti et al. (arXiv 2205.05198) with terms of its own
for grouped queries, gated MLPs and absent sublayers: what eager execution keeps for the backward
(`test_footprint.py` holds it against what autograd really saves). Not counted: the allocator's
slack, buffers of the communication library, temporaries.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from bevatron.checkpoint.shard import local
from bevatron.parallel.layout import Layout
from bevatron.spec import MLP, Attention, ModelSpec

FP32 = 4


def local_bytes(parameters: list[Tensor]) -> int:
    """Of this rank's shards."""
    return sum(local(p.detach()).numel() * p.element_size() for p in parameters)


def unsharded(parameter: Tensor) -> int:
    """Elements of this rank's tensor-parallel part, once the data-parallel ranks have gathered
    it."""
    numel = parameter.numel()
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        for name, place in zip(names, parameter.placements, strict=True):
            if name == "tp" and place.is_shard():
                whole = parameter.shape[place.dim]  # type: ignore[attr-defined]
                ranks = parameter.device_mesh.size(names.index(name))
                numel = numel // whole * -(-whole // ranks)
    return numel


def gathered_elements(parameters: dict[str, Tensor], resharded: bool) -> int:
    """Elements of gathered weights at the worst moment: all of the stage's, or if they are
    resharded after use, those of two neighbouring modules (one in use, one on its way)."""
    modules: dict[str, int] = {}
    for name, parameter in parameters.items():
        parts = name.split(".")
        module = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
        modules[module] = modules.get(module, 0) + unsharded(parameter)
    sizes = list(modules.values())
    if not resharded:
        return sum(sizes)
    return max((a + b for a, b in zip(sizes, [*sizes[1:], 0], strict=True)), default=0)


def layer_activations(
    spec: ModelSpec, index: int, layout: Layout, itemsize: int, recompute: str
) -> float:
    """Bytes per token that one layer keeps for its backward, on one rank.

    A token is one of this rank's context-parallel share, before it is cut by sequence parallelism.
    """
    h, tp = spec.hidden_size, layout.tp
    shares = tp if layout.sequence_parallel else 1
    layer = spec.layers[index]
    if layer.attention is None and layer.mlp is None:
        return 0.0
    if recompute == "full":
        return h * itemsize / shares  # what came in
    total = 0.0
    for sublayer in (layer.attention, layer.mlp):
        if sublayer is None:
            continue
        # The norm keeps an fp32 copy of its input and the normalised values, the product after it
        # its whole input, which sequence parallelism has gathered.
        total += h * (FP32 + itemsize) / shares + h * itemsize
        if isinstance(sublayer, Attention):
            heads, width = sublayer.num_attention_heads, sublayer.head_dim
            groups = max(sublayer.num_key_value_heads, tp)  # each rank has at least one
            rows = (heads + 2 * groups) * width  # the product, alive through its values
            rotated = (heads + groups * layout.cp) * width
            total += (rows + rotated + 2 * heads * width) * itemsize / tp + FP32 * heads / tp
        elif isinstance(sublayer, MLP):
            kept = 4 if sublayer.gated else 2  # gate and up, act(gate), the product; relu, squared
            total += kept * sublayer.intermediate_size * itemsize / tp
    return total


def head_bytes(
    spec: ModelSpec, layout: Layout, tokens: int, itemsize: int, chunk_logits: int
) -> float:
    """What the last stage's loss holds: the gradients of the hidden states and of the head, which
    its forward computes, and three copies of one chunk of fp32 logits."""
    h, rows = spec.hidden_size, -(-spec.head_rows // layout.tp)
    chunk = min(tokens * rows, max(chunk_logits, rows))
    shares = layout.tp if layout.sequence_parallel else 1
    kept = tokens * h * (itemsize + (FP32 + itemsize) / shares) + rows * h * itemsize
    return kept + rows * h * FP32 + 3 * FP32 * chunk


def in_flight(schedule: str, pp: int, stage: int, micro_batches: int) -> int:
    """Micro-batches whose activations a stage holds at once at the most."""
    if schedule == "gpipe":
        return micro_batches
    # 1F1B; schedules with several stages per rank hold about as much in all as its first stage.
    return min(micro_batches, pp - stage if schedule == "1f1b" else pp)


def bubble(schedule: str, pp: int, micro_batches: int, stages_per_rank: int = 1) -> float:
    """Share of a step in which a rank of an otherwise balanced pipeline waits."""
    idle = (pp - 1) / stages_per_rank
    return idle / (micro_batches + idle)
