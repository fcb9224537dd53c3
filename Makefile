# `make demo` and `make test` need nothing but Python 3.11 to 3.13; they make .venv/ themselves.
# torch is pinned for development: a plain `pip install torch` fetches gigabytes of CUDA.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: help demo test test-slow test-compat lint bench clean

help:
	@echo "make demo   set up .venv, then convert, train in 3D, resume, export, verify, generate"
	@echo "make test   set up .venv, then all tests but the slow ones"
	@echo "make test-slow    the slow ones: all layouts, all resumes, thirty kills (an hour or two)"
	@echo "make test-compat  the same with transformers 4.57 in .venv-compat: reading exports, bevatron.hf"
	@echo "make lint   format, lint and types"
	@echo "make bench  the benchmarks (minutes; see benchmarks/RESULTS.md)"
	@echo "make clean  remove .venv and demo"

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[hf]"
	touch $@

.venv/ready-for-tests: .venv/ready
	$(BIN)/python -m pip install -q -e ".[hf,dev]"
	touch $@

demo: .venv/ready
	$(BIN)/bevatron demo --overwrite

test: .venv/ready-for-tests
	$(BIN)/python -m pytest

test-slow: .venv/ready-for-tests
	$(BIN)/python -m pip install -q -e ".[eval]"
	$(BIN)/python -m pytest -m slow

.venv-compat/ready: Makefile pyproject.toml
	$(PYTHON) -m venv .venv-compat
	.venv-compat/bin/python -m pip install -q --upgrade pip
	.venv-compat/bin/python -m pip install -q "$(TORCH)"
	.venv-compat/bin/python -m pip install -q -e . "transformers==4.57.6" pytest hypothesis
	touch $@

test-compat: .venv/ready-for-tests .venv-compat/ready
	$(BIN)/python -m pytest tests/compat
	.venv-compat/bin/python -m pytest tests/hf

lint: .venv/ready-for-tests
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

bench: .venv/ready-for-tests
	$(BIN)/python benchmarks/conversion.py

clean:
	rm -rf .venv .venv-compat demo
