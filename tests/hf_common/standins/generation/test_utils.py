class GenerationTesterMixin:
    """Theirs is in a checkout only; tests/hf/test_hf.py has generations of its own."""
