"""A made-up run that looks like a real one; an inverse worker dies in the middle of it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

from kfac_dist.config import JobSpec, parse_spec
from kfac_dist.runs import (
    Evaluation,
    Event,
    JobSummary,
    RunFolder,
    StalenessSummary,
    StepRecord,
    WorkerCounts,
)

LAYERS = tuple(f"{part}.{number}" for part in ("encoder", "decoder") for number in (0, 2, 4, 6))
START = 1_700_000_000.0
BOUND = 40
KILLED_AT = 180


def sample_spec(**changes: object) -> JobSpec:
    values: dict[str, object] = {
        "name": "digits",
        "task": "autoencoder",
        "steps": 300,
        "batch_size": 500,
    }
    return parse_spec(values | changes)


def sample_record(step: int, **changes: object) -> StepRecord:
    values: dict[str, object] = {
        "step": step,
        "time": START + step,
        "loss": 100.0,
        "objective": 101.0,
        "num_cases": 500,
        "update_norm": 0.5,
        "step_seconds": 0.25,
        "parameter_version": step,
    }
    return StepRecord.model_validate(values | changes)


def sample_records(steps: int) -> Iterator[StepRecord]:
    chance = random.Random(0)
    damping, gamma = 150.0, 12.0
    versions = dict.fromkeys(LAYERS, 1)
    for step in range(1, steps + 1):
        for number, layer in enumerate(LAYERS):
            replaced = KILLED_AT <= step < KILLED_AT + 48 and number % 2 == 1
            if not replaced and (step + 3 * number) % 24 == 0:
                versions[layer] = max(1, step - chance.randint(1, 6))
        ratio = None
        if step % 5 == 0:
            ratio = 0.9 + 0.25 * math.sin(step / 30) + chance.gauss(0, 0.15)
            damping *= 0.77 if ratio > 0.75 else 1.0
        gamma = max(0.05, gamma * (0.6 if step % 20 == 0 else 1.0))
        ages = [step - version for version in versions.values()]
        objective = 55 + 490 * math.exp(-((step / 9) ** 0.55)) + chance.gauss(0, 0.8)
        yield sample_record(
            step,
            objective=objective,
            loss=objective - 0.4,
            damping=damping,
            gamma=gamma,
            reduction_ratio=ratio,
            alpha=0.9,
            mu=0.6,
            update_norm=2.5 * math.exp(-step / 120) * chance.uniform(0.8, 1.2),
            step_seconds=0.24 * chance.uniform(0.9, 1.25) * (1.6 if step in range(180, 190) else 1),
            inverse_version_step=dict(versions),
            inverse_staleness_steps=StalenessSummary(mean=sum(ages) / len(ages), max=max(ages)),
            numeric_events={"raised_damping": step // 90},
            evaluation=_evaluation(objective) if step % 60 == 0 else None,
        )


def _evaluation(objective: float) -> Evaluation:
    return Evaluation(
        train={"objective": objective - 6},
        test={"objective": objective + 1.5},
        train_averaged={"objective": objective - 7},
        test_averaged={"objective": objective + 0.5},
    )


def sample_run(path: Path, steps: int = 300, **changes: object) -> RunFolder:
    """A finished run in `path`."""
    folder = RunFolder.create(path, sample_spec(steps=steps, **changes))
    records = list(sample_records(steps))
    for record in records:
        folder.append_metrics(record)
    for event in (
        Event(kind="started", message="Training began.", step=1, time=START),
        Event(kind="checkpoint_written", message="Checkpoint of step 100.", step=100, time=START),
        Event(
            kind="worker_died",
            message="inverse_worker 0 died (SIGKILL); training continues with its last inverses.",
            step=KILLED_AT,
            time=START + KILLED_AT,
            severity="error",
            role="inverse_worker",
            rank=0,
        ),
        Event(
            kind="worker_restarted",
            message="inverse_worker 0 is back; its statistics are collected again.",
            step=KILLED_AT + 12,
            time=START + KILLED_AT + 3,
            severity="warning",
            role="inverse_worker",
            rank=0,
        ),
    ):
        folder.append_event(event)
    job = folder.update_job(state="SUCCEEDED", step=steps)
    ages = [record.inverse_staleness_steps for record in records if record.inverse_staleness_steps]
    folder.write_summary(
        JobSummary(
            job=job.job,
            state="SUCCEEDED",
            step=steps,
            train={"objective": 55.1, "squared_error": 4.02},
            test={"objective": 57.3, "squared_error": 4.4},
            train_averaged={"objective": 54.6, "squared_error": 3.9},
            test_averaged={"objective": 56.9, "squared_error": 4.3},
            initial_objective=records[0].objective,
            wall_seconds=86.4,
            steps_per_second=3.9,
            inverse_staleness_steps=StalenessSummary(
                mean=sum(age.mean for age in ages) / len(ages), max=max(age.max for age in ages)
            ),
            workers=WorkerCounts(gradient=1, inverse=1, parameter_server=1),
            run_dir=str(path),
        )
    )
    return folder
