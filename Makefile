# Two commands matter: `make demo` and `make test`. Both make the virtual environment when it is missing.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint format bench proto proto-lint proto-baseline

.venv: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch .venv

demo: .venv
	$(BIN)/kfac-dist train examples/mnist_5k.yaml --run-dir runs/demo-$$(date +%Y%m%d-%H%M%S) -o json

test: .venv
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

lint: .venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stubs in kfac_dist/v1; a test fails when they are not of the proto files.
proto: .venv
	proto/generate

BUF ?= .venv/node/node_modules/.bin/buf

$(BUF): | .venv
	npm install --silent --no-audit --no-fund --prefix .venv/node @bufbuild/buf@1.75.0

# Breaking is told against the interface of the last release, kept as an image.
proto-lint: $(BUF)
	cd proto && ../$(BUF) lint && ../$(BUF) breaking --against baseline.binpb

# With a release, and only then.
proto-baseline: $(BUF)
	cd proto && ../$(BUF) build --exclude-source-info -o baseline.binpb

bench: .venv
	$(BIN)/python benchmarks/time_to_objective.py --short
	$(BIN)/python benchmarks/structures.py --short
	$(BIN)/python benchmarks/step_cost.py --short
	$(BIN)/python benchmarks/staleness.py --short
	$(BIN)/python benchmarks/distributed_cost.py --short
	$(BIN)/python benchmarks/scaling.py --short
	$(BIN)/python benchmarks/inversion.py --short
	$(BIN)/python benchmarks/memory.py --short
	$(BIN)/python benchmarks/service_calls.py --short
