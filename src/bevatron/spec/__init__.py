"""What a model is, as plain data: `ModelSpec` and its parts, its JSON form, its exact counts."""

from bevatron.spec.adapter import Adapter
from bevatron.spec.attention import Attention
from bevatron.spec.linear import Linear
from bevatron.spec.mlp import MLP
from bevatron.spec.model import Head, HeadKind, Init, LayerSpec, ModelSpec, Norm
from bevatron.spec.parameter import ParameterSpec, Role, Shape, SpecError
from bevatron.spec.rope import Rope
from bevatron.spec.sublayer import Sublayer

__all__ = [
    "MLP",
    "Adapter",
    "Attention",
    "Head",
    "HeadKind",
    "Init",
    "LayerSpec",
    "Linear",
    "ModelSpec",
    "Norm",
    "ParameterSpec",
    "Role",
    "Rope",
    "Shape",
    "SpecError",
    "Sublayer",
]
