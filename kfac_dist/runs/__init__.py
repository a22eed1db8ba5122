"""The folder of a run: records, journals, report. The driver writes it, anyone reads it."""

from kfac_dist.runs.folder import RunFolder, RunIdentity, check_folder
from kfac_dist.runs.records import (
    ENDED,
    Evaluation,
    Event,
    Failure,
    Inversion,
    JobRecord,
    JobSummary,
    Metrics,
    RunState,
    StalenessSummary,
    WorkerCounts,
)
from kfac_dist.runs.step_record import StepRecord

__all__ = [
    "ENDED",
    "Evaluation",
    "Event",
    "Failure",
    "Inversion",
    "JobRecord",
    "JobSummary",
    "Metrics",
    "RunFolder",
    "RunIdentity",
    "RunState",
    "StalenessSummary",
    "StepRecord",
    "WorkerCounts",
    "check_folder",
]
