# One word a target; each does its own set-up, in a virtual environment within the checkout.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
PYTEST := $(BIN)/python -m pytest

.PHONY: help install demo test wide slow check lint types layers format bench secrets clean

help:            ## what there is
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */\1\t/' | column -t -s "$$(printf '\t')"

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 …" >&2; rm -rf $(VENV); exit 2; }
	@echo "setting up $(VENV) (about a minute, once) …" >&2
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt \
	  --editable '.[adk,embedded,qdrant,parquet]' --group dev
	@touch $@

install: $(READY) ## set up the virtual environment

demo: $(READY)    ## a leaking chat service, cleaned up before your eyes
	@$(BIN)/agent-reconciler demo

test: $(READY)    ## the tests of the core, on real Redis and real ADK
	@$(PYTEST) -n 2 --dist loadgroup -m "not slow and not wide"

wide: $(READY)    ## the tests of what stands around it: ADK, bindings, clusters, the page
	@$(PYTEST) -n 2 --dist loadgroup -m "wide and not slow"

slow: $(READY)    ## long loads, outages and failovers, in real processes
	@$(PYTEST) -m slow -rA --durations=0

check: lint types layers ## everything but the tests

lint: $(READY)    ## ruff, and its format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)   ## mypy --strict
	@$(BIN)/mypy

layers: $(READY)  ## the import contracts
	@$(BIN)/lint-imports

format: $(READY)  ## bring the code into shape
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(READY)   ## every benchmark, as ratios
	@for b in benchmarks/*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

secrets:         ## passwords and token of compose.yaml, into deploy/secrets
	@deploy/make-secrets.sh

clean:           ## remove what was made
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache artefacts build dist
