"""What does the controller need from whatever runs jobs? `RayJobRunner` provides it with Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, Protocol

from kfac_dist.coordination.jobs.placement import Room


class AttemptKey(NamedTuple):
    """An attempt of a job."""

    job: str
    attempt: int

    @property
    def submission_id(self) -> str:
        """Its name on the cluster."""
        return f"{self.job}-a{self.attempt}"


class RunnerState(StrEnum):
    """How the cluster sees an attempt; RUNNING means only that its driver was started."""

    UNKNOWN = "unknown"
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True)
class RunnerStatus:
    """What the cluster says about an attempt."""

    state: RunnerState
    message: str = ""

    @property
    def is_over(self) -> bool:
        """Whether no driver runs or will run."""
        return self.state not in (RunnerState.PENDING, RunnerState.RUNNING)


@dataclass(frozen=True, kw_only=True)
class Remnant:
    """Something of an attempt that still exists: an actor, a process, shared memory, ..."""

    description: str


class JobRunner(Protocol):
    """Runs attempts of jobs. Thread-safe; every method may raise UnreachableError."""

    def submit(self, key: AttemptKey, run_dir: Path) -> None:
        """Start the driver of an attempt, whose launch file is in `run_dir`.

        Submitting the same attempt again does not start a second driver.
        """

    def stop(self, key: AttemptKey) -> None:
        """Send SIGTERM to the attempt's driver; does nothing when the attempt is over."""

    def kill(self, key: AttemptKey) -> None:
        """End everything of the attempt by force."""

    def status(self, key: AttemptKey) -> RunnerStatus:
        """Return how the cluster sees the attempt."""

    def list(self) -> Mapping[AttemptKey, RunnerStatus]:
        """Return all attempts that the cluster knows."""

    def resources(self) -> Room:
        """Return all the room of the cluster, used or not."""

    def remains(self, key: AttemptKey) -> Sequence[Remnant]:
        """Return what still exists of the attempt; an empty answer proves that nothing does."""
