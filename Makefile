# One word per job; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install services demo test check torture bench docs lock clean

help:  ## List the jobs
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "holdfast needs Python 3.11 or newer; try make PYTHON=python3.11"; exit 1; }
	@echo "creating $(VENV) from requirements.lock"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

install: $(READY)  ## Create the environment from the lock file

services:  ## Install the servers the tests use (Debian packages) where they are missing
	@bash scripts/services.sh

demo: $(READY)  ## A sale over real HTTP on SQLite, with an audit at the end
	@$(BIN)/holdfast demo

test: $(READY)  ## All tests, the real servers included
	@bash scripts/services.sh || [ -z "$${CI:-}" ]
	@$(BIN)/python -m pytest

check: $(READY)  ## Format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

torture: $(READY) services  ## Kills, races and crashes with the full N; prints what was done
	@TORTURE=full $(BIN)/python -m pytest tests/faults tests/contract/test_model.py -m torture

bench: $(READY) services  ## Orders and messages per second against baselines, peers and the limit; backlogs and poison
	@$(BIN)/python -m benchmarks.bench_orders
	@$(BIN)/python -m benchmarks.bench_messages
	@$(BIN)/python -m benchmarks.bench_backlog

docs: $(READY)  ## Check that the pages tell the truth: commands, settings, links
	@$(BIN)/python -m pytest tests/test_docs.py

lock: $(READY)  ## Resolve requirements.lock anew
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip compile pyproject.toml --universal --quiet --extra all --group dev --group bench \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate --output-file requirements.lock

clean:  ## Remove the environment and caches
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build
