"""Conversion between Hugging Face folders and native checkpoints: the two functions to call."""

from bevatron.bridge.conversion_report import ConversionReport
from bevatron.bridge.export_hf import export_checkpoint
from bevatron.bridge.import_hf import import_checkpoint

__all__ = ["ConversionReport", "export_checkpoint", "import_checkpoint"]
