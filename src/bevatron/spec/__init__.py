"""What a model is, as plain data: `ModelSpec` and its parts, its JSON form, its exact counts."""

from bevatron.spec.model import (
    MLP,
    Attention,
    Head,
    Init,
    LayerSpec,
    Linear,
    ModelSpec,
    Norm,
    ParameterSpec,
    Rope,
    SpecError,
)

__all__ = [
    "MLP",
    "Attention",
    "Head",
    "Init",
    "LayerSpec",
    "Linear",
    "ModelSpec",
    "Norm",
    "ParameterSpec",
    "Rope",
    "SpecError",
]
