"""Compiling layers one by one, and choosing which of their activations are computed again.

Selective recomputation keeps what is expensive to compute, the outputs of matrix products and of
the attention kernel. It computes norms, rotations, activations and sums again: this saves about
half of the activation memory and repeats no matrix product. In eager layers it is a policy of
torch's checkpoint. In compiled layers the compiler itself chooses which forward values to keep,
with half of its memory budget, because a checkpoint around a compiled layer cannot see inside.

Full recomputation is a checkpoint around the layer, compiled or not. (A checkpoint inside of the
compiled code fails under tensor parallelism, because meshes are not tensors and cannot be saved.)
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from bevatron.errors import BevatronError
from bevatron.nn.decoder import Decoder  # with it bevatron's own operators

Recompute = Literal["none", "selective", "full"]

BACKEND = "inductor"  # tests take a faster one
COMPILED_BUDGET = 0.5  # of the memory between recomputing everything and what is fastest

_ATEN = torch.ops.aten
# What selective recomputation keeps. Batched products are not among them: in attention without a
# fused kernel they are the scores of all pairs of tokens.
KEPT = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    torch.ops.bevatron.tiled_attention.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
}


def prepare(decoder: Decoder, recompute: Recompute, compiled: bool) -> None:
    """Make every layer of a decoder compute as asked; before fully_shard, whose hooks must stay
    outside of what is recomputed."""
    layers: list[Any] = list(decoder.layers.values())
    if compiled:
        distinct = len(
            {(decoder.spec.layers[int(i)], _parameters(m)) for i, m in decoder.layers.items()}
        )
        _compile(layers, distinct, COMPILED_BUDGET if recompute == "selective" else 1.0)
    for layer in layers:
        if recompute == "full":
            layer.run = partial(checkpoint, layer.run, use_reentrant=False)
        elif recompute == "selective" and not compiled:
            contexts = partial(create_selective_checkpoint_contexts, _policy)
            layer.run = partial(checkpoint, layer.run, use_reentrant=False, context_fn=contexts)


def _parameters(layer: nn.Module) -> tuple[tuple[str, bool], ...]:
    """A layer's parameters, and whether they take a gradient: the compiled code depends on it."""
    return tuple((name, p.requires_grad) for name, p in layer.named_parameters())


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _compile(layers: list[Any], distinct: int, budget: float) -> None:
    """Compile every layer, whole or not at all. Equal layers share one artefact.

    Dynamo keeps the artefacts of all layers under the one code object that they share, and beyond a
    limit, 8, silently runs eagerly. A layer has one for training, one for evaluation, and more
    where its input differs, as at a stage's begin. Beyond the limit set here it raises."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as partitioner

    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * distinct)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * distinct)
    dynamo.fail_on_recompile_limit_hit = True
    partitioner.activation_memory_budget = budget
    for layer in layers:
        run = torch.compile(layer.run, dynamic=False, fullgraph=True, backend=BACKEND)
        layer.run = partial(_compiled, run)


def _compiled(run: Any, *args: Any) -> Any:
    """Call a compiled layer, which compiles it the first time."""
    try:
        return run(*args)
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        said = str(error).strip().partition("\n")[0]
        raise BevatronError(
            f"train.compile: a layer could not be compiled ({type(error).__name__}: {said}); "
            "use compile: false, or install what it misses"
        ) from error
