# The two commands a user needs are `make demo` and `make test`; each creates .venv itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   import, merge, restore and measure real adapters"
	@echo "make test   run the tests"
	@echo "make lint   ruff and mypy"
	@echo "make bench  the benchmarks, as tables, kept in docs/benchmarks.md"
	@echo "make docs   check that the documentation's examples run"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "unmerge needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per extra, renewed when the project's requirements change.
$(VENV)/.%: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing unmerge[$*] into $(VENV)"
	@$(INSTALL) --editable '.[$*]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/unmerge demo --out demo-output --overwrite

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m tests.benchmarks --save

docs: $(VENV)/.test
	$(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf $(VENV) demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
