"""Published models by name, as specs: to start a run from, to plan with, and to check counts on."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from bevatron.errors import BevatronError
from bevatron.families.llama_nemotron import width
from bevatron.families.registry import Family, by_name, for_spec
from bevatron.spec import MLP, Attention, Init, LayerSpec, Linear, ModelSpec, Norm, Rope

# Llama-Nemotron layers as `first-last:attention/mlp`. Attention: aN has N query heads per KV head,
# L is linear, - absent. MLP: the published ffn_mult, L or -.
SUPER_49B = """
    0:a8/2.625 1-5:a8/5.25 6-7:-/2.625 8-10:a8/5.25 11:-/3.28125 12-41:a8/5.25 42:-/1.3125
    43-44:-/2.625 45:-/1.3125 46:-/5.25 47:-/1.3125 48:-/2.625 49-51:-/1.3125 52:a8/5.25
    53:-/1.3125 54-55:-/1.0 56:-/1.3125 57-59:-/1.0 60-61:-/1.3125 62-63:-/0.5 64-65:-/1.0
    66-67:-/0.5 68:-/1.0 69-70:-/0.5 71-79:a8/5.25
"""
ULTRA_253B = """
    0:a16/0.4875 1:a16/0.975 2-7:a16/1.4625 8:a16/1.95 9-12:-/- 13-15:a16/1.95 16-17:a16/4.875
    18-23:-/- 24-26:a16/4.875 27-31:-/- 32-34:a16/4.875 35:a16/2.4375 36-38:-/- 39-41:a16/1.95
    42:-/1.95 43:a16/4.875 44:-/4.875 45-49:-/- 50-53:a16/4.875 54-58:-/- 59-62:a16/4.875
    63-67:-/- 68-71:a16/4.875 72-76:-/- 77-80:a16/4.875 81-85:-/- 86:a16/4.875 87-89:a16/3.4125
    90-91:-/- 92:a16/2.925 93-95:a16/2.4375 96-97:-/2.4375 98:a16/2.4375 99:-/- 100-106:-/2.4375
    107:a16/2.4375 108-112:-/- 113:a16/2.925 114:a16/4.875 115:-/4.875 116:a16/4.875 117-124:-/-
    125:-/36.5625 126-133:-/- 134:-/39.0 135-142:-/- 143:-/31.40625 144-148:-/- 149:-/27.5625
    150:-/1.95 151:a16/1.95 152:a16/2.4375 153:-/- 154-155:a16/2.4375 156:a16/3.4125
    157-160:a16/4.875 161:a16/2.4375
"""
NEMOTRON_51B = """
    0:a8/1.3125 1:a16/2.625 2-4:a8/5.25 5-6:a32/2.625 7-8:a64/2.625 9-10:a32/2.625 11:L/2.625
    12:a64/2.625 13-14:a32/2.625 15:L/1.3125 16-34:a8/5.25 35:L/2.625 36-37:a8/5.25 38:L/2.625
    39:L/5.25 40-42:L/2.625 43:-/1.3125 44:L/1.3125 45:a8/5.25 46:-/1.3125 47:L/1.3125
    48:-/1.3125 49:a8/5.25 50:L/1.3125 51:-/1.3125 52-53:L/1.3125 54-55:-/1.3125 56:L/1.3125
    57-58:-/1.3125 59-62:L/1.3125 63-79:a8/5.25
"""


def _llama3_rope(factor: float) -> Rope:
    return Rope(
        500000.0,
        "llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


def _llama(
    h: int,
    layers: int,
    heads: int,
    kv: int,
    f: int,
    rope: Rope,
    context: int,
    vocab: int = 128256,
    head_dim: int = 128,
    tied: bool = False,
) -> ModelSpec:
    return ModelSpec(
        vocab_size=vocab,
        hidden_size=h,
        layers=(LayerSpec(Attention(heads, kv, head_dim), MLP(f)),) * layers,
        norm=Norm("rms", 1e-5),
        rope=rope,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
    )


def _nemotron(h: int, heads: int, f: int) -> ModelSpec:
    mlp = MLP(f, "relu2", gated=False)
    return ModelSpec(
        vocab_size=256000,
        hidden_size=h,
        layers=(LayerSpec(Attention(heads, 8, 128), mlp),) * 32,
        norm=Norm("layernorm1p", 1e-5),
        rope=Rope(partial=0.5),
        max_position_embeddings=4096,
        init=Init(0.0134),
    )


def nanochat(depth: int, vocab_size: int = 65536) -> ModelSpec:
    """64 channels per layer, rounded up to whole heads of 128."""
    heads = (depth + 1) // 2
    h = 128 * heads
    mlp = MLP(4 * h, "relu2", gated=False)
    return ModelSpec(
        vocab_size=vocab_size,
        hidden_size=h,
        layers=(LayerSpec(Attention(heads, heads, 128, qk_norm=True), mlp),) * depth,
        norm=Norm("rms", 1e-6, weight=False),
        rope=Rope(reversed=True),
        max_position_embeddings=2048,
        embedding_norm=True,
        logit_softcap=15.0,
        init=Init(scale_attention_output=True),
    )


def _llama_nemotron(h: int, heads: int, blocks: str, factor: float) -> ModelSpec:
    return ModelSpec(
        vocab_size=128256,
        hidden_size=h,
        layers=tuple(read_blocks(blocks, h, heads)),
        norm=Norm("rms", 1e-5),
        rope=_llama3_rope(factor),
        max_position_embeddings=131072,
    )


def read_blocks(text: str, hidden_size: int, heads: int) -> list[LayerSpec]:
    """The layers of a block list as above; its ranges must follow on one another from 0."""
    layers: list[LayerSpec] = []
    for item in text.split():
        where, _, what = item.partition(":")
        first, _, last = where.partition("-")
        if int(first) != len(layers):
            raise BevatronError(f"block list: {item!r} follows on {len(layers)} layers")
        a, _, m = what.partition("/")
        layer = LayerSpec(_block_attention(a, hidden_size, heads), _block_mlp(m, hidden_size))
        layers += [layer] * (int(last or first) - int(first) + 1)
    return layers


def _block_attention(text: str, hidden_size: int, heads: int) -> Attention | Linear | None:
    if text in ("-", "L"):
        return Linear() if text == "L" else None
    return Attention(heads, heads // int(text.removeprefix("a")), hidden_size // heads)


def _block_mlp(text: str, hidden_size: int) -> MLP | Linear | None:
    if text in ("-", "L"):
        return Linear() if text == "L" else None
    return MLP(width(float(text), hidden_size))


_LLAMA31 = _llama3_rope(8.0)

PRESETS: dict[str, Callable[[], ModelSpec]] = {
    "llama2-7b": lambda: _llama(4096, 32, 32, 32, 11008, Rope(), 4096, vocab=32000),
    "llama2-13b": lambda: _llama(5120, 40, 40, 40, 13824, Rope(), 4096, vocab=32000),
    "llama2-70b": lambda: _llama(8192, 80, 64, 8, 28672, Rope(), 4096, vocab=32000),
    "llama3-8b": lambda: _llama(4096, 32, 32, 8, 14336, Rope(500000.0), 8192),
    "llama3-70b": lambda: _llama(8192, 80, 64, 8, 28672, Rope(500000.0), 8192),
    "llama3.1-8b": lambda: _llama(4096, 32, 32, 8, 14336, _LLAMA31, 131072),
    "llama3.1-70b": lambda: _llama(8192, 80, 64, 8, 28672, _LLAMA31, 131072),
    "llama3.1-405b": lambda: _llama(16384, 126, 128, 8, 53248, _LLAMA31, 131072),
    "llama3.2-1b": lambda: _llama(
        2048, 16, 32, 8, 8192, _llama3_rope(32.0), 131072, head_dim=64, tied=True
    ),
    "llama3.2-3b": lambda: _llama(3072, 28, 24, 8, 8192, _llama3_rope(32.0), 131072, tied=True),
    "llama3.3-70b": lambda: _llama(8192, 80, 64, 8, 28672, _LLAMA31, 131072),
    "llama3.1-minitron-4b-width": lambda: _llama(3072, 32, 32, 8, 9216, _LLAMA31, 131072),
    "llama3.1-minitron-4b-depth": lambda: _llama(4096, 16, 32, 8, 14336, _LLAMA31, 131072),
    "mistral-nemo-12b": lambda: _llama(5120, 40, 32, 8, 14336, Rope(1e6), 128000, vocab=131072),
    "mistral-nemo-minitron-8b": lambda: _llama(
        4096, 40, 32, 8, 11520, Rope(1e6), 8192, vocab=131072
    ),
    "minitron-4b": lambda: _nemotron(3072, 24, 9216),
    "minitron-8b": lambda: _nemotron(4096, 48, 16384),
    "nemotron4-15b": lambda: _nemotron(6144, 48, 24576),
    "nanochat-d20": lambda: nanochat(20),
    "nanochat-d32": lambda: nanochat(32),
    "llama-nemotron-nano-4b": lambda: _llama(3072, 32, 32, 8, 9216, _LLAMA31, 131072),
    "llama-nemotron-nano-8b": lambda: _llama(4096, 32, 32, 8, 14336, _LLAMA31, 131072),
    "llama-nemotron-70b": lambda: _llama(8192, 80, 64, 8, 28672, _LLAMA31, 131072),
    "llama-nemotron-super-49b": lambda: _llama_nemotron(8192, 64, SUPER_49B, 8.0),
    "llama-nemotron-ultra-253b": lambda: _llama_nemotron(16384, 128, ULTRA_253B, 16.0),
    "llama-nemotron-51b": lambda: _llama_nemotron(8192, 64, NEMOTRON_51B, 8.0),
}


def preset(name: str) -> ModelSpec:
    """The spec of a published model. Raises BevatronError that names those nearest in spelling."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 3, 0.5) or list(PRESETS)
        raise BevatronError(f"no published model is called {name!r}; nearest: {', '.join(near)}")
    return PRESETS[name]()


def family_of(name: str) -> Family:
    """The family that a published model is stored in; its layers alone may be another's too."""
    return by_name("mistral") if name.startswith("mistral") else for_spec(preset(name))
