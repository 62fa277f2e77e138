# medfed: everything a newcomer types. Each target makes .venv from constraints.txt when it is missing.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
# public data sets of the examples and tests: yours through MEDFED_DATA, else a folder beside the checkout
MEDFED_DATA ?= $(wildcard $(CURDIR)/../shared/data)
export MEDFED_DATA
COHORT ?= breast-cancer

.PHONY: install demo test test-rooms test-runs soak federation lint types bench bench-peers docs results clean

install: $(VENV)/.installed

# a C compiler, where there is one, makes the recurrent models' cell; without it torch's operations take its place
$(VENV)/.installed: pyproject.toml constraints.txt medfed/recurrent_cell.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[sim,explain,onnx,molecules,nifti,dev]'
	touch $@

demo: install
	$(BIN)/medfed-simulate run --cohort breast-cancer --epsilon 1 --out runs/demo

federation: install
	$(BIN)/medfed-simulate federation --cohort $(COHORT) --out runs/federation

# two at once: the federation's processes wait for each other most of the time
PYTEST = room=$$(mktemp -d) && trap 'rm -rf "$$room"' EXIT && PYTEST_DEBUG_TEMPROOT="$$room" $(BIN)/python -m pytest
test: install
	$(MAKE) --no-print-directory --output-sync=target --jobs=2 test-runs test-rooms

test-rooms:
	$(PYTEST) --ignore tests/federation --ignore tests/simulations

# whole runs, over TLS and simulated
test-runs:
	$(PYTEST) tests/federation tests/simulations

# Flower's own simulation engine, for its test
$(VENV)/.ray: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	touch $@

soak: install $(VENV)/.ray
	$(BIN)/python -m pytest -m soak

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow setuptools' package-dir: a farm of symbolic links shows it the installed layout
ROOMS := client models privacy server simulations studies
types: install
	rm -rf .typing && mkdir -p .typing/medfed
	for file in medfed/*.py medfed/py.typed; do ln -s ../../$$file .typing/medfed/; done
	for room in $(ROOMS); do ln -s ../../$$room .typing/medfed/$$room; done
	$(BIN)/mypy -p medfed

# the pages made from the code: error codes, help texts
docs: install
	$(BIN)/python tests/hall/test_docs.py

# docs/results.md and its pictures, from the committed figures. To measure what is missing of those (hours on a busy machine,
# resumable): python -m medfed.simulations.results measure
results: install
	$(BIN)/python -m medfed.simulations.results write

bench: install
	$(BIN)/python -m medfed.simulations.benchmarks rounds --json
	$(BIN)/python -m medfed.simulations.benchmarks federation --json
	$(BIN)/python -m medfed.simulations.benchmarks simulation --json
	$(BIN)/python -m medfed.simulations.benchmarks ledger --json
	$(BIN)/python -m medfed.simulations.benchmarks secagg --json
	$(BIN)/python -m medfed.simulations.benchmarks gradients --json

# what the benchmark of secure aggregation compares with: Flower's SecAgg+ is in Flower, which is installed; CKKS is TenSEAL's
bench-peers: install
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt tenseal==0.3.18

clean:
	rm -rf $(VENV) .typing build dist
