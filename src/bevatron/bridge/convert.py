"""Conversion between Hugging Face folders and native checkpoints: the two functions to call."""

from bevatron.bridge.exporter import export_checkpoint
from bevatron.bridge.importer import import_checkpoint
from bevatron.bridge.report import ConversionReport

__all__ = ["ConversionReport", "export_checkpoint", "import_checkpoint"]
