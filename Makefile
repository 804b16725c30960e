# `make demo`, `make test`, `make lint`: each does all its own set-up, in the active environment or else in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(CURDIR)/.venv)
PY := $(ENV)/bin/python
STAMP := $(ENV)/.losa$(subst /,-,$(CURDIR))

.PHONY: demo test lint setup
setup: $(STAMP)

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || (echo "losa needs Python 3.11 or newer: make PYTHON=..."; exit 1)
	test -x $(PY) || $(PYTHON) -m venv $(ENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(PY) -m losa demo

test: $(STAMP)
	$(PY) -m pytest -n logical --maxprocesses 4 --dist worksteal

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
