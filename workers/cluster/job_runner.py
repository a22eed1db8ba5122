"""Runs attempts of jobs on a Ray cluster, through its Jobs API."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_actors, list_nodes, list_placement_groups
from ray.util.state.exception import RayStateApiException

from kfac_dist.coordination.jobs.placement import Room
from kfac_dist.coordination.jobs.runner import AttemptKey, Remnant, RunnerState, RunnerStatus
from kfac_dist.errors import UnreachableError
from workers.cluster.head import Head
from workers.cluster.leftovers import MARK, kill_processes, processes_of, shared_memory_of
from workers.cluster.ray_internals import use_token

_STATES = {
    JobStatus.PENDING: RunnerState.PENDING,
    JobStatus.RUNNING: RunnerState.RUNNING,
    JobStatus.STOPPED: RunnerState.STOPPED,
    JobStatus.SUCCEEDED: RunnerState.SUCCEEDED,
    JobStatus.FAILED: RunnerState.FAILED,
}
_SUBMISSION = re.compile(r"(?P<job>.+)-a(?P<attempt>[1-9][0-9]*)")
_LOCAL = ("127.0.0.1", "localhost", "::1")
_DRIVER = (sys.executable, "-m", "kfac_dist.cli", "driver")
_MOST_ENTRIES = 10_000

# Ray's stubs leave these untyped.
_list_actors: Any = list_actors
_list_nodes: Any = list_nodes
_list_placement_groups: Any = list_placement_groups


class RayJobRunner:
    """A JobRunner on the cluster whose Jobs API is at `jobs_url`.

    Drivers run on the head node with `driver`, the command and its first arguments. Run folders
    must be on a file system that all nodes share. On a cluster of this machine alone, processes
    and shared memory are looked at as well as Ray's own tables.
    """

    def __init__(
        self,
        jobs_url: str,
        *,
        gcs_address: str | None = None,
        token_path: Path | None = None,
        driver: Sequence[str] = _DRIVER,
    ) -> None:
        """Use the secret in `token_path`, without one what the environment says of Ray's mode.

        The secret is the whole process's. Drivers connect to `gcs_address`, without one to where
        Ray tells them, which on a machine with several clusters may be the wrong one.
        """
        if token_path is not None:
            use_token(token_path)
        else:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        self._url = jobs_url
        self._driver = tuple(driver)
        self._options = ("--ray-address", gcs_address) if gcs_address else ()
        self._is_local = urlsplit(jobs_url).hostname in _LOCAL
        # What processes that are to end have used; they are gone when one wants to know.
        self._shared_memory: dict[AttemptKey, set[Path]] = {}

    @cached_property
    def _client(self) -> JobSubmissionClient:
        with self._reached():
            return JobSubmissionClient(self._url)

    @classmethod
    def of_head(cls, head: Head) -> RayJobRunner:
        """Return the runner of an embedded cluster."""
        token_path = Path(head.token_path)
        return cls(head.jobs_url, gcs_address=head.gcs_address, token_path=token_path)

    def submit(self, key: AttemptKey, run_dir: Path) -> None:
        """Start the driver; submitting an attempt again starts no second one."""
        command = shlex.join([*self._driver, str(run_dir), str(key.attempt), *self._options])
        with self._reached():
            if self._details(key) is not None:
                return
            self._client.submit_job(
                entrypoint=f"exec {command}",  # no shell stays between Ray and the driver
                submission_id=key.submission_id,
                # Its workers have it, too.
                runtime_env={"env_vars": {MARK: key.submission_id}},
            )

    def stop(self, key: AttemptKey) -> None:
        """Let the driver be sent SIGTERM, and SIGKILL where it does not end in time."""
        if self._is_local:
            self._note_shared_memory(key)
        with self._reached():
            if not self.status(key).is_over:
                self._client.stop_job(key.submission_id)

    def kill(self, key: AttemptKey) -> None:
        """End everything of the attempt by force; where it runs elsewhere, as Ray does it."""
        self.stop(key)
        if self._is_local:
            kill_processes(key.submission_id)

    def _note_shared_memory(self, key: AttemptKey) -> None:
        noted = self._shared_memory.setdefault(key, set())
        noted.update(shared_memory_of(key.submission_id))

    def status(self, key: AttemptKey) -> RunnerStatus:
        """How Ray's table of jobs sees the attempt."""
        with self._reached():
            details = self._details(key)
        return RunnerStatus(state=RunnerState.UNKNOWN) if details is None else _status(details)

    def list(self) -> Mapping[AttemptKey, RunnerStatus]:
        """All attempts in Ray's table; other people's submissions are left out."""
        with self._reached():
            jobs = self._client.list_jobs()
        found = {}
        for details in jobs:
            match = _SUBMISSION.fullmatch(details.submission_id or "")
            if match is not None:
                key = AttemptKey(match["job"], int(match["attempt"]))
                found[key] = _status(details)
        return found

    def resources(self) -> Room:
        """What the nodes that are alive have, used or not."""
        with self._reached():
            nodes = _list_nodes(address=self._url, filters=[("state", "=", "ALIVE")], detail=True)
        totals = [node.resources_total for node in nodes]
        return Room(
            num_cpus=int(sum(total.get("CPU", 0) for total in totals)),
            num_gpus=int(sum(total.get("GPU", 0) for total in totals)),
            num_inverse_slots=int(sum(total.get("inverse", 0) for total in totals)),
        )

    def remains(self, key: AttemptKey) -> Sequence[Remnant]:
        """What of the attempt is still there, by Ray's tables and by this machine's."""
        found = list(self._remains_in_ray(key))
        if not self._is_local:
            return found
        self._note_shared_memory(key)
        for pid, title in processes_of(key.submission_id):
            found.append(Remnant(description=f"process {pid} ({title})"))
        for path in self._shared_memory.pop(key, ()):
            if path.exists():
                found.append(Remnant(description=f"shared memory {path}"))
                self._shared_memory.setdefault(key, set()).add(path)
        return found

    def _remains_in_ray(self, key: AttemptKey) -> Iterator[Remnant]:
        with self._reached():
            details = self._details(key)
            if details is None or details.job_id is None:
                return
            options = {"address": self._url, "limit": _MOST_ENTRIES}
            of_job = ("job_id", "=", details.job_id)
            actors = _list_actors(filters=[of_job, ("state", "!=", "DEAD")], **options)
            of_creator = ("creator_job_id", "=", details.job_id)
            groups = _list_placement_groups(
                filters=[of_creator, ("state", "!=", "REMOVED")], **options
            )
        for actor in actors:
            yield Remnant(description=f"actor {actor.class_name} ({actor.pid})")
        for group in groups:
            description = f"placement group {group.placement_group_id}"
            yield Remnant(description=description)

    def _details(self, key: AttemptKey) -> Any:
        """Ray's entry of the attempt, None when there is none."""
        try:
            return self._client.get_job_info(key.submission_id)
        except RuntimeError as error:  # Ray's client raises nothing finer
            if "does not exist" in str(error):
                return None
            raise

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (
            ConnectionError,
            RuntimeError,
            RayStateApiException,
            requests.RequestException,
        ) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UnreachableError(f"Ray's Jobs API at {self._url}: {lines[-1]}") from error


def _status(details: Any) -> RunnerStatus:
    return RunnerStatus(
        state=_STATES[details.status],
        message=_first_sentence(details.message or ""),
    )


def _first_sentence(message: str) -> str:
    """Leave out the log that Ray appends, which the run's folder has."""
    lines = message.partition(", last available logs")[0].splitlines()
    return lines[0] if lines else ""
