"""What a model costs: parameters, bytes and FLOPs, all read off `ModelSpec.parameters()`."""

from __future__ import annotations

from bevatron.spec.model import Attention, ModelSpec, Role, SpecError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_MATMUL: frozenset[Role] = frozenset({"qkv", "o", "gate_up", "up", "down", "linear"})


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the model; a tied head counts once."""
    return sum(p.numel for p in spec.parameters())


def parameters_by_role(spec: ModelSpec) -> dict[Role, int]:
    """Parameters per role, in the order in which the model first has one. Sums to the count."""
    counts: dict[Role, int] = {}
    for p in spec.parameters():
        counts[p.role] = counts.get(p.role, 0) + p.numel
    return counts


def nbytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of all weights in `dtype`, one of `BYTES`."""
    if dtype not in BYTES:
        raise SpecError(f"dtype {dtype!r} is not one of {', '.join(BYTES)}")
    return parameter_count(spec) * BYTES[dtype]


def layer_flops(spec: ModelSpec, index: int, seq_len: int, causal: bool) -> int:
    """Forward FLOPs per token of one layer: 2 per matrix element, and attention over `seq_len`.

    Scores and weighted values take 4 * seq_len * H * D per token; a causal kernel skips half of
    them. Norms, biases, activations and the rotation are left out.
    """
    flops = sum(2 * p.numel for p in spec.layer_parameters(index) if p.role in _MATMUL)
    attention = spec.layers[index].attention
    if isinstance(attention, Attention):
        full = 4 * seq_len * attention.num_attention_heads * attention.head_dim
        flops += full // 2 if causal else full
    return flops


def forward_flops_per_token(spec: ModelSpec, seq_len: int, causal: bool) -> int:
    """FLOPs per token of a forward pass over sequences of `seq_len` tokens.

        2 * head rows * h + sum over layers of (2 * matrix elements + 4 * seq_len * H * D)

    with 2 in place of 4 if `causal`; a layer without attention has no second term. The first term
    is the head (V rows for a causal_lm, also when it is tied; the embedding lookup costs nothing).
    """
    layers = (layer_flops(spec, i, seq_len, causal) for i in range(len(spec.layers)))
    return 2 * spec.head_rows * spec.hidden_size + sum(layers)


def flops_per_token(spec: ModelSpec, seq_len: int, causal: bool) -> int:
    """FLOPs per token of one training step: backward takes twice the forward. Recomputed
    activations do not count."""
    return 3 * forward_flops_per_token(spec, seq_len, causal)
