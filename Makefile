# Every target does its own set-up: a fresh clone needs nothing but make and a Python of 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Small networks on small batches: more threads only wait for each other.
export OMP_NUM_THREADS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv test quick check lint format demo benchmark-demo benchmark-erasure benchmark-ink benchmark-teacher grid wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

venv: $(INSTALLED)  ## create .venv with the pinned dependencies and an editable install

# torch first and alone: pinned, it resolves to a CPU wheel where one is offered.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Tests are many and small: two processes of one thread each.
test quick: export OMP_NUM_THREADS = 1

test: $(INSTALLED)  ## run every test
	@$(BIN)/python -m pytest -n 2

quick: $(INSTALLED)  ## run the quick suite
	@$(BIN)/python -m pytest -n 2 -m "not slow"

lint: $(INSTALLED)  ## formatting, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

check: lint test  ## what continuous integration runs

format: $(INSTALLED)  ## rewrite the files as the formatter wants them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

demo: $(INSTALLED)  ## erase a concept, distil, and judge both, on the embedded world
	@$(BIN)/sublimate demo

benchmark-demo: $(INSTALLED)  ## measure the erasers and the demo's student on Ink, n = 2000, 3 seeds; resumable
	@$(BIN)/python benchmarks/demo.py

benchmark-erasure: $(INSTALLED)  ## measure and attack every eraser on three kinds of concept; resumable
	@$(BIN)/python benchmarks/erasure.py

benchmark-ink: $(INSTALLED)  ## train every objective from Ink's teacher with one budget, and measure all; resumable
	@$(BIN)/python benchmarks/ink.py

benchmark-teacher: $(INSTALLED)  ## measure Ink's teacher: agreement, Ink-FID, precision, recall
	@$(BIN)/sublimate evaluate ink --out benchmarks/results/teacher.json

grid: $(INSTALLED)  ## run both property matrices on every family, and write the README's grid; hours
	@$(BIN)/python benchmarks/grid.py

# sdist first: a wheel built in the tree would ship whatever an old build/ still holds.
wheel: $(INSTALLED)  ## build the source distribution and, from it, the wheel
	@$(BIN)/python -m build

clean:  ## remove what was built, the environment included
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
