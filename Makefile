# Two commands matter: `make demo` and `make test`. Both make the virtual environment if it is missing.
BIN := .venv/bin

.PHONY: demo test test-gpu test-pythons test-nodes test-chaos lint format bench proto proto-lint proto-baseline

# A new environment gets the newest Python on the PATH, or that of `make PYTHON=python3.12`; an
# environment that is already there keeps its own.
.venv: pyproject.toml constraints.txt
	@[ -x $(BIN)/python ] || { python=$(or $(PYTHON),$$(.ci/pythons newest)) && $$python -m venv .venv; }
	@$(BIN)/python -c 'import sys; print("using python%d.%d (%d.%d.%d)" % (*sys.version_info[:2], *sys.version_info[:3]))'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch .venv

demo: .venv
	$(BIN)/kfac-dist train examples/mnist_5k.yaml --run-dir runs/demo-$$(date +%Y%m%d-%H%M%S) -o json

test: .venv
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

# What only a GPU can show, in less than 10 minutes on a machine that has one.
test-gpu: .venv
	$(BIN)/python -m tests.gpu.run

# On the other Pythons of this machine, what needs neither torch nor Ray.
test-pythons: .venv
	.ci/test-pythons

# Ray nodes in network namespaces, as root: two machines with nothing in common but a network.
test-nodes: .venv
	KFAC_DIST_TEST_NODES=1 $(BIN)/python -m pytest tests/nodes

lint: .venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Generates the stubs in kfac_dist/v1; a test fails when they do not match the proto files.
proto: .venv
	proto/generate

BUF ?= .venv/node/node_modules/.bin/buf

$(BUF): | .venv
	npm install --silent --no-audit --no-fund --prefix .venv/node @bufbuild/buf@1.75.0

# Compares the interface with that of the last release, which is kept as an image.
proto-lint: $(BUF)
	cd proto && ../$(BUF) lint && ../$(BUF) breaking --against baseline.binpb

# Renews that image; only a release does.
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
	$(BIN)/python benchmarks/data_reading.py --short
	$(BIN)/python benchmarks/bytes_by_role.py --short
	$(BIN)/python benchmarks/service_calls.py --short

# Kills and stops every role at every moment of a small job; about a quarter of an hour.
test-chaos: .venv
	$(BIN)/python benchmarks/faults.py --out benchmarks/results
