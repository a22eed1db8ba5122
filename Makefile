# Two commands matter: `make demo` and `make test`. Both make the virtual environment when it is missing.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint format bench

.venv: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch .venv

demo: .venv
	$(BIN)/kfac-dist train examples/mnist_5k.yaml --run-dir runs/demo-$$(date +%Y%m%d-%H%M%S) -o json

test: .venv
	$(BIN)/python -m pytest

lint: .venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv
	$(BIN)/python benchmarks/time_to_objective.py --short
	$(BIN)/python benchmarks/structures.py --short
	$(BIN)/python benchmarks/step_cost.py --short
