"""Bevatron: Hugging Face checkpoints in, trained at any layout, and back out bit for bit."""

__version__ = "0.1.0"
