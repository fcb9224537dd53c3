"""`bevatron demo`: everything that Bevatron promises, run on one machine in a few minutes."""

from bevatron.demo.tour import demo

__all__ = ["demo"]
