# `make demo` and `make test` are all that a fresh machine needs: each makes its own .venv first.

PYTHON ?= python3
# More options for pip, such as PIP_ARGS="--index-url https://mirror.example/simple"
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := demo,dev
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt

# Runs on any Python since 2.7, so that an old one gets this line and not a syntax error.
CHECK_PYTHON := import sys; v = sys.version_info; \
	sys.exit(0 if (3, 11) <= v[:2] < (3, 14) else \
	"sparsebert needs Python 3.11, 3.12 or 3.13, but %s is %d.%d: name another one, as in make PYTHON=python3.12" \
	" (and remove .venv if there is one)" % (sys.executable, v[0], v[1]))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test slow cuda lint types gpu-check install clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## compress a real model, save, reload, compare: ends in one table (about 7 minutes)
	$(BIN)/sparsebert demo $(DEMO_ARGS)

# A process a core with one thread each: most of the time is Python's. A file stays in one process, with what it made.
IN_PARALLEL := -n auto --maxprocesses 4 --dist loadfile
test: export OMP_NUM_THREADS := 1
test: $(STAMP) ## the tests that need no GPU (about 12 minutes on two cores)
	$(BIN)/python -m pytest -q $(IN_PARALLEL) -m "not gpu and not slow" --ignore tests/interpreted $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(IN_PARALLEL) tests/interpreted

slow: $(STAMP) ## the tests that `make test` leaves out for time: builds and installs the package
	$(BIN)/python -m pytest -q -m "slow and not gpu" $(PYTEST_ARGS)

cuda: $(STAMP) ## the CUDA kernels, by nvcc, beside the package: needs no GPU
	SPARSEBERT_CUDA=1 $(BIN)/python setup.py build_ext --inplace

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy
	$(BIN)/mypy

# No environment of its own and no pip: it runs on GPU machines without a network. It reads BUDGET_S, OUT and DRY,
# which make passes on whether they come from its command line or from the environment.
gpu-check: ## GPU tests and baselines with $(PYTHON) as it is; DRY=1 walks the steps without a GPU
	$(PYTHON) benchmarks/gpu_check.py

install: $(STAMP) ## only the environment

clean: ## removes builds and caches, keeps .venv
	rm -rf build dist sparsebert/_C.*.so *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Written last, so a failed install leaves none and the next run tries again. What the package is built with comes
# first, pinned, because it is taken from the environment: pip would fetch the newest ones for a build of its own.
$(STAMP): pyproject.toml setup.py constraints.txt
	@rm -f $@
	@test -x $(BIN)/python || command -v $(PYTHON) >/dev/null || \
		{ echo "no $(PYTHON) here: name a Python 3.11 to 3.13, as in make PYTHON=/usr/bin/python3.12" >&2; exit 1; }
	@if test -x $(BIN)/python; then $(BIN)/python -c '$(CHECK_PYTHON)'; else $(PYTHON) -c '$(CHECK_PYTHON)'; fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools wheel ninja pybind11
	$(PIP_INSTALL) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@
