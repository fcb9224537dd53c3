"""Bevatron: Hugging Face checkpoints come in, train at any layout, and go back out bit for bit."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bevatron.auto_bridge.auto_bridge import AutoBridge as AutoBridge

__version__ = "0.1.0"
__all__ = ["AutoBridge", "__version__"]


def __getattr__(name: str) -> Any:
    """Public names are loaded when they are asked for, so that importing the package is instant."""
    if name == "AutoBridge":
        from bevatron.auto_bridge.auto_bridge import AutoBridge

        return AutoBridge
    raise AttributeError(f"module 'bevatron' has no attribute {name!r}")
