# Everything runs in a virtual environment of its own: `make demo`, `make test`, `make lint`, `make types`.

PYTHON ?= python3
VENV ?= .venv
# The tests and figures were made with this version; the package itself takes torch >= 2.6.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test coverage lint format types clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train LeNet-5 on real images with SOFIM and with SGD-momentum"
	@echo "make test      run the tests"
	@echo "make coverage  run the tests and report the lines that none of them reaches"
	@echo "make lint      check style (make format: repair it)"
	@echo "make types     check types"
	@echo "make clean     remove the virtual environment and caches"

demo: $(READY)
	$(BIN)/python -m examples.train $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

coverage: $(READY)
	$(BIN)/python -m pytest --cov=sofim_fused --cov-report=term-missing $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

# torch goes first and alone: a range in a dependency could pull a build of several gigabytes.
$(READY): pyproject.toml setup.py Makefile
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "Python's venv module is missing; installing Debian's python3-venv"; \
	    apt-get update -qq && apt-get install -y -qq python3-venv \
	      || { echo "That takes root: run  sudo apt-get install python3-venv  and make again" >&2; exit 1; }; \
	fi
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip 'setuptools>=77'
	$(BIN)/python -m pip install -q '$(TORCH)' 'numpy>=1.26'
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
