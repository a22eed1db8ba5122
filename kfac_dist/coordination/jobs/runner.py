"""What the controller needs of whatever runs jobs; `RayJobRunner` does it with Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, Protocol


class AttemptKey(NamedTuple):
    """An attempt of a job."""

    job: str
    attempt: int

    @property
    def submission_id(self) -> str:
        """Its name on the cluster."""
        return f"{self.job}-a{self.attempt}"


class RunnerState(StrEnum):
    """How the cluster sees an attempt; that it runs means only that its driver was started."""

    UNKNOWN = "unknown"
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True)
class RunnerStatus:
    """What the cluster says of an attempt; `exit_code` is the driver's, where it is known."""

    state: RunnerState
    message: str = ""
    exit_code: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether no driver runs or will run."""
        return self.state not in (RunnerState.PENDING, RunnerState.RUNNING)


@dataclass(frozen=True, kw_only=True)
class ClusterResources:
    """All there is on the cluster, used or not."""

    num_cpus: int
    num_gpus: int
    num_inverse_slots: int


@dataclass(frozen=True, kw_only=True)
class Remnant:
    """Something of an attempt that is still there; `kind` is driver, actor, process, ..."""

    kind: str
    description: str


class JobRunner(Protocol):
    """Runs attempts of jobs. Thread-safe; every method may raise UnreachableError."""

    def submit(self, key: AttemptKey, run_dir: Path) -> None:
        """Start the driver of an attempt, whose launch file is in `run_dir`.

        Submitting the same attempt again starts no second driver.
        """

    def stop(self, key: AttemptKey) -> None:
        """Let the attempt end: its driver gets SIGTERM. Without effect on what is over."""

    def kill(self, key: AttemptKey) -> None:
        """End everything of the attempt by force."""

    def status(self, key: AttemptKey) -> RunnerStatus:
        """How the cluster sees the attempt."""

    def list(self) -> Mapping[AttemptKey, RunnerStatus]:
        """All attempts that the cluster knows."""

    def resources(self) -> ClusterResources:
        """What there is to place workers on."""

    def remains(self, key: AttemptKey) -> Sequence[Remnant]:
        """What of the attempt is still there; empty is the proof that nothing is."""
