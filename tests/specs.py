"""Tiny specs that between them have every layer kind."""

from __future__ import annotations

from bevatron.spec import MLP, Attention, Init, LayerSpec, Linear, ModelSpec, Norm, Rope

LLAMA3_ROPE = Rope(
    500000.0,
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
INIT = Init(std=0.08)

# Odd vocabulary, untied, grouped queries.
HOMOGENEOUS = ModelSpec(
    vocab_size=97,
    hidden_size=32,
    layers=(LayerSpec(Attention(4, 2, 8), MLP(48)),) * 4,
    rope=LLAMA3_ROPE,
    init=INIT,
)

# Tied; 1, 3, 4 and 2 KV heads; no-op and linear sublayers, an empty layer; other widths, biases.
HETEROGENEOUS = ModelSpec(
    vocab_size=101,
    hidden_size=32,
    layers=(
        LayerSpec(Attention(4, 1, 8), MLP(44)),
        LayerSpec(None, MLP(27)),
        LayerSpec(Attention(6, 3, 8, qkv_bias=True, o_bias=True), None),
        LayerSpec(Linear(), MLP(50, bias=True)),
        LayerSpec(None, None),
        LayerSpec(Attention(4, 4, 16), Linear()),
        LayerSpec(Attention(4, 2, 8), MLP(36)),
    ),
    tie_word_embeddings=True,
    rope=LLAMA3_ROPE,
    init=INIT,
)

# NanoChat's kinds: no norm weights, QK norm, reversed rope, softcap, ungated MLP.
NANOCHAT = ModelSpec(
    vocab_size=96,
    hidden_size=32,
    layers=(LayerSpec(Attention(4, 4, 8, qk_norm=True), MLP(64, "relu2", gated=False)),) * 3,
    norm=Norm("rms", 1e-6, weight=False),
    rope=Rope(reversed=True),
    embedding_norm=True,
    logit_softcap=15.0,
    init=Init(std=0.08, scale_attention_output=True),
)

# Nemotron's kinds: LayerNorm1P, partial rope, ungated squared ReLU.
NEMOTRON = ModelSpec(
    vocab_size=96,
    hidden_size=32,
    layers=(LayerSpec(Attention(6, 3, 8), MLP(64, "relu2", gated=False)),) * 3,
    norm=Norm("layernorm1p", 1e-5),
    rope=Rope(partial=0.5),
    init=INIT,
)

ALL = {
    "homogeneous": HOMOGENEOUS,
    "heterogeneous": HETEROGENEOUS,
    "nanochat": NANOCHAT,
    "nemotron": NEMOTRON,
}
