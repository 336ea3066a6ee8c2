# Needs Python 3.11 or newer with pip, and make. Everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check clean

demo: $(VENV)/.runtime  ## set up, and transcribe the bundled sample with the bundled model
	$(BIN)/quasr transcribe src/quasr/demo/sample.flac

test: $(VENV)/.develop  ## set up, and run every test, the slow ones too
	$(BIN)/python -m pytest

check: $(VENV)/.develop  ## style, types, import rules and the fast tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m "not slow"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: nothing that follows can then choose another build of it.
$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) --editable '.[cuda]'
	touch $@

$(VENV)/.develop: $(VENV)/.runtime
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
