# Needs Python 3.11 or newer with pip, and make. Everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The base install alone, in an environment of its own in which there is no torch, and what is tested there.
BASE_VENV ?= .venv-base
BASE_PIP = $(BASE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
BASE_TESTS = $(wildcard tests/unit/test_audio_*.py tests/unit/test_text_*.py tests/unit/test_output_*.py \
	tests/unit/test_engine_onnx_session.py tests/unit/test_native_decoder.py tests/unit/test_native_library.py \
	tests/unit/test_pipeline_transcribe.py tests/unit/test_pipeline_guard.py \
	tests/unit/test_weights_hub.py tests/unit/test_public_api.py tests/unit/test_cli_doctor.py \
	tests/unit/test_cli_transcribe.py tests/base)

# A worker a core; each may need 2 GB. Stealing leaves the tests of a file together, with what they share.
WORKERS ?= 2
PYTEST = python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: demo test test-base check clean

demo: $(VENV)/.runtime  ## set up, and transcribe the bundled sample with the bundled model
	$(BIN)/quasr transcribe src/quasr/demo/sample.flac

test: $(VENV)/.develop  ## set up, and run every test, the slow ones too
	$(BIN)/$(PYTEST)

test-base:  ## install without any extra, and run what needs no torch
	$(PYTHON) -m venv --clear $(BASE_VENV)
	$(BASE_PIP) . pytest pytest-xdist hypothesis
	! $(BASE_VENV)/bin/python -c "import torch" 2>/dev/null
	$(BASE_VENV)/bin/$(PYTEST) -m "not slow" $(BASE_TESTS)
	$(BASE_VENV)/bin/quasr transcribe src/quasr/demo/sample.flac

check: $(VENV)/.develop  ## style, types, import rules and the fast tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/$(PYTEST) -m "not slow"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

# torch goes first and alone: nothing that follows can then choose another build of it.
$(VENV)/.develop: $(VENV)/.runtime
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(BASE_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
