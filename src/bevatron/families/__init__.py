"""How each Hugging Face architecture spells a spec: config.json <-> ModelSpec, and its weight map.

A family is data about names and fields; it holds no tensors and no modules.
"""

from bevatron.families import llama, llama_nemotron, mistral, nanochat, nemotron
from bevatron.families.registry import (
    Family,
    FamilyError,
    by_name,
    families,
    for_config,
    for_spec,
    register,
)

__all__ = ["Family", "FamilyError", "by_name", "families", "for_config", "for_spec", "register"]

# Their order decides: the first one that can express a changed model is what it is exported as.
for _module in (llama, nanochat, nemotron, llama_nemotron, mistral):
    register(_module.FAMILY)
