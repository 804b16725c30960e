# `make demo`, `make test`, `make lint`, `make docs`, `make dist`: each does all its own set-up, in the active environment or else in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(CURDIR)/.venv)
PY := $(ENV)/bin/python
STAMP := $(ENV)/.losa$(subst /,-,$(CURDIR))

.PHONY: demo test lint setup docs docs-setup dist
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

# The packages of the extra `docs`, without losa and torch: the site is built from the sources alone.
docs-setup:
	test -x $(PY) || $(PYTHON) -m venv $(ENV)
	$(PY) -c "import material, mkdocstrings_handlers.python" 2>/dev/null || $(PY) -m pip install --quiet \
	  $$($(PY) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")

docs: docs-setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

# The wheel and the source distribution, in dist/; the latter is installed in an environment of its own and tried there.
dist: $(STAMP)
	rm -rf dist build/smoke
	$(PY) -c "import build" 2>/dev/null || $(PY) -m pip install --quiet build "setuptools>=77"
	$(PY) -m build --no-isolation --outdir dist
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/pip install --quiet "$(TORCH)"
	build/smoke/bin/pip install --quiet dist/losa-*.tar.gz
	cd build/smoke && HF_HUB_OFFLINE=1 bin/losa doctor
