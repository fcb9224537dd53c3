class ExportTesterMixin:
    """Theirs needs exporters that we do not install."""
