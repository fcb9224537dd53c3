"""transformers' own common model tests on Llama-Nemotron; optional, see `theirs.py`."""
