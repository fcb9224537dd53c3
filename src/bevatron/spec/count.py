"""What a model costs: parameters, bytes and FLOPs, all read off `ModelSpec.parameters()`."""

from __future__ import annotations

from bevatron.spec.model import ModelSpec
from bevatron.spec.parameter import Role, SpecError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    """Forward FLOPs per token of one layer: its sublayers'. Norms are left out."""
    present = spec.layers[index].present
    return sum(sublayer.flops(spec.hidden_size, seq_len, causal) for _, sublayer in present)


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


def adapter_parameters(spec: ModelSpec) -> int:
    """Parameters that are stored with the model's adapter: its own, and those trained whole."""
    adapter = spec.adapter
    return sum(p.numel for p in spec.parameters() if adapter is not None and adapter.owns(p.name))


def describe_adapter(spec: ModelSpec) -> str:
    """`lora of rank 16 (alpha 32) beside 84 linear maps: 1,234 parameters, 0.9% of the model's`."""
    adapter = spec.adapter
    assert adapter is not None
    maps = sum(p.role == "lora_a" for p in spec.parameters())
    own, whole = adapter_parameters(spec), parameter_count(spec.base)
    besides = f", with {len(adapter.whole)} tensors of it whole" if adapter.whole else ""
    return (
        f"{adapter.kind} of rank {adapter.rank} (alpha {adapter.alpha:g}) beside {maps} linear "
        f"maps{besides}: {own:,} parameters, {own / whole:.2%} of the model's {whole:,}"
    )
