"""How much memory a placed stage will take on its device.

Weights, gradients, optimizer state and gathered weights are read off the placed parameters, so
these numbers are exact. Activations are estimated by a formula: what eager execution keeps for the
backward, after Korthikanti et al. (arXiv 2205.05198) with more terms for grouped queries, gated
MLPs and absent sublayers (`test_footprint.py` compares it with what autograd really saves). The
allocator's slack, buffers of the communication library and temporary tensors are not counted.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from bevatron.checkpoint.rank_boxes import local
from bevatron.parallel.layout import ZERO_BUBBLE, Layout
from bevatron.spec import ModelSpec
from bevatron.spec.sublayer import FP32

ENDS = ("embed", "head")


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


def module_elements(parameters: dict[str, Tensor]) -> dict[str, int]:
    """Unsharded elements of every layer, and of the embedding, the final norm and the head."""
    modules: dict[str, int] = {}
    for name, parameter in parameters.items():
        parts = name.split(".")
        module = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
        modules[module] = modules.get(module, 0) + unsharded(parameter)
    return modules


def gathered_elements(parameters: dict[str, Tensor], resharded: bool) -> int:
    """Elements of gathered weights at the worst moment: all of the stage's, or if they are
    resharded after use, those of two neighbouring modules (one in use, one on its way)."""
    sizes = list(module_elements(parameters).values())
    if not resharded:
        return sum(sizes)
    return max((a + b for a, b in zip(sizes, [*sizes[1:], 0], strict=True)), default=0)


def gradient_bytes(
    parameters: dict[str, Tensor], spec: ModelSpec, layout: Layout, itemsize: int, count: int
) -> int:
    """Bytes of gradients at the worst moment of a step of `count` micro-batches.

    Over several shards and without a pipeline, gradients are reduced to fp32 shards after every
    micro-batch. Else they are summed unsharded, in fp32, and reduced once, module by module, so
    that the shards take the sums' place. Besides, in the backward's own dtype, there is what has
    just been computed and is not yet added: of one layer (or embedding, or head), and of what
    belongs to FSDP's root, which waits for the end; of all layers where a schedule computes
    weights' gradients apart. Sums in the same dtype are added in place.
    """
    modules = module_elements(parameters)
    root = [name for name in modules if name == "final_norm" or (spec.tied and name in ENDS)]
    waiting = sum(modules.pop(name) for name in root)
    sums = FP32 * (waiting + sum(modules.values()))
    shards = local_bytes(list(parameters.values()))
    if layout.schedule in ZERO_BUBBLE and layout.pp > 1:
        fresh = waiting + sum(modules.values())
    else:
        fresh = waiting + max(modules.values(), default=0)
    reduced_at_once = layout.pp == 1 and layout.shards > 1
    if count == 1 or reduced_at_once:
        return shards + itemsize * fresh
    return sums + (0 if itemsize == FP32 else itemsize * fresh)


def layer_activations(
    spec: ModelSpec, index: int, layout: Layout, itemsize: int, recompute: str
) -> float:
    """Bytes per token that one layer keeps for its backward, on one rank.

    A token is one of this rank's context-parallel share, before it is cut by sequence parallelism.
    """
    h, tp = spec.hidden_size, layout.tp
    shares = tp if layout.sequence_parallel else 1
    present = [sublayer for _, sublayer in spec.layers[index].present]
    if not present:
        return 0.0
    came_in = h * itemsize / shares
    if recompute == "full":
        return came_in
    if recompute == "selective":
        # Beside the products, every sublayer's output, and its sum over tensor-parallel ranks.
        out = (h + (h / shares if tp > 1 else 0)) * itemsize
        return sum(out + s.product_bytes(itemsize, tp) for s in present) + came_in
    # The norm keeps an fp32 copy of its input and the normalised values, the product after it its
    # whole input, which sequence parallelism has gathered.
    normed = h * (FP32 + itemsize) / shares + h * itemsize
    return sum(normed + s.activation_bytes(itemsize, tp, layout.cp) for s in present)


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


def bubble(layout: Layout, micro_batches: int) -> float:
    """Share of a step in which a rank of an otherwise balanced pipeline waits, if a stage's
    forward, backward for its input and backward for its weights take equally long (Narayanan et
    al., arXiv 2104.04473; Qi et al., arXiv 2401.10241)."""
    idle = (layout.pp - 1) / layout.stages_per_rank
    if layout.schedule in ZERO_BUBBLE:
        idle *= 0.0 if layout.schedule == "zbv" else 1 / 3
    return idle / (micro_batches + idle)
