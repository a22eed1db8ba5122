"""Whole jobs on the project's workers: wall seconds, without evaluations.

Jobs run one after the other, because each has its own processes. SGD and Adam use the same workers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kfac_dist import train
from kfac_dist.config import JobSpec
from kfac_dist.runs import RunFolder
from peers.ours import Changes, changed

EVALUATIONS = 8


def jobs(spec: JobSpec, learning_rates: Mapping[str, float], steps: int) -> dict[str, JobSpec]:
    """Return K-FAC on one gradient and one inverse worker, and baselines on two gradient workers.

    `steps` are those of K-FAC. The baselines, whose steps cost less, do three times as many.
    """
    kfac = {"workers.gradient": 1, "workers.inverse": 1}
    return {"kfac": _job(spec, kfac, steps)} | {
        name: _job(spec, {"workers.gradient": 2, "optimizer": _baseline(spec, name, lr)}, 3 * steps)
        for name, lr in learning_rates.items()
    }


def _job(spec: JobSpec, changes: Changes, steps: int) -> JobSpec:
    lengths = {
        "steps": steps,
        "evaluation.every_steps": max(1, steps // EVALUATIONS),
        "checkpoint.every_steps": None,
    }
    return changed(spec, lengths | changes)


def _baseline(spec: JobSpec, name: str, lr: float) -> dict[str, Any]:
    return {"name": name, "lr": lr, "l2": spec.optimizer.l2}


def run_job(spec: JobSpec, data_dir: Path | None) -> dict[str, Any]:
    """Run a job and return its curve over the seconds of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        summary = train(spec, data_dir=data_dir, run_dir=Path(folder) / "run")
        curve = list(_points(Path(folder) / "run"))
    return {
        "workers": summary.workers.model_dump(),
        "steps": summary.step,
        "steps_per_second": summary.steps_per_second,
        "curve": curve,
    }


def _points(run_dir: Path) -> Iterator[dict[str, float]]:
    seconds = 0.0
    for record in RunFolder.open(run_dir).read_metrics():
        seconds += record.step_seconds
        if record.evaluation is None:
            continue
        point = {"wall_seconds": round(seconds, 2), "step": record.step}
        point["loss"] = round(record.evaluation.train["loss"], 3)
        if record.evaluation.train_averaged is not None:
            point["averaged_loss"] = round(record.evaluation.train_averaged["loss"], 3)
        yield point
