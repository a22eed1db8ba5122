"""Does K-FAC reach a lower training loss than tuned Adam in the same number of steps?

Whole jobs on the project's own workers: first the specification as it is, then with Adam at each
learning rate of a grid, of which the best counts. Objectives are over the whole training set, in
nats a case, with the l2 term.

    python benchmarks/against_adam.py examples/cifar10_convnet.yaml --data-dir ../shared/data
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import surroundings

from kfac_dist import train
from kfac_dist.config import JobSpec, load_spec, parse_spec

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def run(spec: JobSpec, data_dir: Path | None) -> dict[str, Any]:
    """Run a job and return its summary."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        summary = train(spec, data_dir=data_dir, run_dir=Path(folder) / "run")
    return {
        "train": summary.train,
        "test": summary.test,
        "steps_per_second": summary.steps_per_second,
        "wall_seconds": round(time.perf_counter() - started, 1),
    }


def contest(path: Path, overrides: list[str], data_dir: Path | None) -> dict[str, Any]:
    """Run a specification with K-FAC, and with Adam at every learning rate."""
    kfac = load_spec(path, overrides=overrides)
    specs = {"kfac": kfac} | {f"adam lr={lr:g}": with_adam(kfac, lr) for lr in LEARNING_RATES}
    results = {}
    for name, spec in specs.items():
        results[name] = run(spec, data_dir)
        print(kfac.name, kfac.seed, name, results[name]["train"], file=sys.stderr)
    best = min((name for name in results if name != "kfac"), key=lambda n: _objective(results[n]))
    return {
        "job": kfac.name,
        "steps": kfac.steps,
        "seed": kfac.seed,
        "best_adam": best,
        "objective_over_best_adam": round(
            _objective(results["kfac"]) / _objective(results[best]), 4
        ),
        "results": results,
    }


def with_adam(spec: JobSpec, lr: float) -> JobSpec:
    """Return the same job with Adam."""
    optimizer = {"name": "adam", "lr": lr, "l2": spec.optimizer.l2, "averaging": None}
    return parse_spec(spec.model_dump() | {"optimizer": optimizer})


def _objective(result: dict[str, Any]) -> float:
    return float(result["train"]["objective"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path, nargs="+")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--set", action="append", default=[], help="an override, as in the CLI")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    started = surroundings()
    runs = [
        contest(path.absolute(), [*arguments.set, f"seed={seed}"], arguments.data_dir)
        for path in arguments.spec
        for seed in range(arguments.seeds)
    ]
    result = {
        "question": "training objective after the same number of steps, K-FAC against tuned Adam",
        **started,
        "learning_rates": LEARNING_RATES,
        "runs": runs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
