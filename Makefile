# Two commands from a fresh machine: git clone, make demo. Needs Python 3.11 or newer with pip, make and git.
#
#   make setup PYTHON=python3.12         another interpreter
#   make setup TORCH='torch==2.13.0+cu130'   another build of torch: anything that pip understands

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
# Every test computes on one thread, so that processes share the cores.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: help setup demo test test-all bench claims docs pages clean
.DEFAULT_GOAL := help

help:
	@echo 'make setup      make $(VENV) and install everything; done once, and again when pyproject.toml changes'
	@echo 'make demo       setup, then adapt three tasks and answer ten inputs (offline)'
	@echo 'make test       setup, then ruff, mypy and the tests (offline)'
	@echo 'make test-all   the slow tests too, with coverage; POLYTASK_DATA=folder adds those on real tasks'
	@echo 'make bench      measure speed against what else there is, as paired ratios'
	@echo 'make claims     measure what papers claim, one line for each'
	@echo 'make docs       build the documentation into site/'
	@echo 'make pages      run the commands of README and tutorial again, and draw the picture of the demo'
	@echo 'make clean      remove what was built, $(VENV) included'

setup: $(STAMP)

# torch first and alone: pip then takes the build that TORCH asks for, and the project's own requirement is met by it.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'polytask needs Python 3.11 or newer, and $(PYTHON) is not: make setup PYTHON=python3.11' >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo 'installing $(TORCH) and the requirements into $(VENV) (minutes, the first time)'
	@$(BIN)/pip install -qq $(TORCH)
	@$(BIN)/pip install -qq -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/polytask demo

# Whatever would reach for a model or data hub fails at once instead of waiting for a network.
test test-all: export HF_HUB_OFFLINE := 1
test test-all: export HF_DATASETS_OFFLINE := 1

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(PARALLEL)

test-all: setup
	$(BIN)/pytest $(PARALLEL) -m '' --durations=10 --cov=polytask --cov-report=term

bench: setup
	$(BIN)/python -m bench.run

claims: setup
	$(BIN)/python -m claims

docs: setup
	$(BIN)/mkdocs build --strict

pages: setup
	$(BIN)/python docs/rerun.py README.md docs/tutorial.md
	$(BIN)/python docs/picture.py

clean:
	rm -rf $(VENV) build dist site .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
