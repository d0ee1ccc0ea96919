# One verb each; continuous integration calls the same ones. Tools come from .venv if there is one, else from PATH.
BIN := $(if $(wildcard .venv/bin/python),.venv/bin/,)
PYTHON := $(BIN)python
PY := kernels backends runtime tests bench

.PHONY: help check static fmt lint types fast test bench support conformance

help:            ## this list
	@grep -E '^[a-z]+: .*##|^[a-z]+:  +##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

check: static fast  ## what must pass before a commit

static: lint types  ## everything that runs no test

fmt:             ## format the code
	$(BIN)ruff format $(PY)
	$(BIN)ruff check --fix $(PY)

lint:            ## formatting and lint rules
	$(BIN)ruff format --check $(PY)
	$(BIN)ruff check $(PY)

types:           ## type checking, strict
	$(BIN)pyright --pythonpath $(PYTHON)

fast:            ## the tests that take seconds
	$(BIN)pytest -q -m "not slow"

test:            ## all tests, as in the README
	$(BIN)pytest

bench:           ## time the default model here; BACKEND=opencl by default; writes bench/results/bench-$(BACKEND).json
	@mkdir -p bench/results
	$(BIN)runtime bench --backend $(BACKEND) --json > bench/results/bench-$(BACKEND).json
	@cat bench/results/bench-$(BACKEND).json

conformance:     ## judge BACKEND against the contract; writes bench/results/conformance-$(BACKEND).json
	@mkdir -p bench/results
	$(BIN)runtime conformance --profile full --backend $(BACKEND) --json > bench/results/conformance-$(BACKEND).json

support:         ## rewrite the README's support table from bench/results/conformance-*.json
	$(PYTHON) bench/support.py

BACKEND ?= opencl
