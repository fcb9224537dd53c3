"""`bevatron demo`: the whole promise for real, on one machine, in a few minutes."""

from bevatron.demo.tour import demo

__all__ = ["demo"]
