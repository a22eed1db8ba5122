"""Runs attempts of jobs on a Ray cluster through its Jobs API."""

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
from ray.exceptions import RayError
from ray.job_submission import JobStatus
from ray.util.state import list_actors, list_nodes, list_placement_groups
from ray.util.state.exception import RayStateApiException

from kfac_dist.coordination.jobs.placement import Room
from kfac_dist.coordination.jobs.runner import AttemptKey, Remnant, RunnerState, RunnerStatus
from kfac_dist.errors import UnreachableError
from workers.cluster.head import Head
from workers.cluster.jobs_api import JobsClient
from workers.cluster.leftovers import MARK, Traces, kill_processes
from workers.cluster.proxies import LOOPBACK_NAMES, bypass_proxies
from workers.cluster.ray_internals import use_token

_STATES = {
    JobStatus.PENDING: RunnerState.PENDING,
    JobStatus.RUNNING: RunnerState.RUNNING,
    JobStatus.STOPPED: RunnerState.STOPPED,
    JobStatus.SUCCEEDED: RunnerState.SUCCEEDED,
    JobStatus.FAILED: RunnerState.FAILED,
}
_SUBMISSION = re.compile(r"(?P<job>.+)-a(?P<attempt>[1-9][0-9]*)")
# -P: nothing is imported from the folder in which the cluster happened to be started.
DRIVER = (sys.executable, "-P", "-m", "kfac_dist.cli", "driver")
_MOST_ENTRIES = 10_000

# Ray's stubs leave these untyped.
_list_actors: Any = list_actors
_list_nodes: Any = list_nodes
_list_placement_groups: Any = list_placement_groups


class RayJobRunner:
    """A JobRunner on a Ray cluster.

    Drivers run on the head node, which must see run folders under the server's path. If the cluster
    is on this machine, processes and shared memory are inspected in addition to Ray's own tables.
    """

    def __init__(
        self,
        jobs_url: str,
        *,
        gcs_address: str | None = None,
        token_path: Path | None = None,
        driver: Sequence[str] = DRIVER,
        traces: Traces | None = None,
    ) -> None:
        """Connect on first use.

        Args:
            jobs_url: the Jobs API of the cluster.
            gcs_address: where drivers connect. Without it the cluster is asked.
            token_path: a file with the cluster's secret, which then applies to this whole process.
                Without it Ray's mode is taken from the environment.
            driver: the command that starts a driver, with its first arguments.
            traces: what attempts left on this machine before, by default nothing.
        """
        if token_path is not None:
            use_token(token_path)
        else:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        bypass_proxies(jobs_url)
        self._url = jobs_url
        self._driver = tuple(driver)
        self._gcs_address = gcs_address
        self._is_local = urlsplit(jobs_url).hostname in LOOPBACK_NAMES
        self._traces = traces or Traces()

    @cached_property
    def _client(self) -> JobsClient:
        with self._reached():
            return JobsClient(self._url)

    @classmethod
    def of_head(cls, head: Head, traces: Traces | None = None) -> RayJobRunner:
        """Return the runner of an embedded cluster."""
        return cls(
            head.jobs_url,
            gcs_address=head.gcs_address,
            token_path=Path(head.token_path),
            traces=traces,
        )

    def submit(self, key: AttemptKey, run_dir: Path) -> None:
        """Start the driver; submitting an attempt again does not start a second one."""
        with self._reached():
            if self._details(key) is not None:
                return
            options = self._driver_options()
            command = shlex.join([*self._driver, str(run_dir), str(key.attempt), *options])
            self._client.submit_job(
                entrypoint=f"exec {command}",  # so that Ray signals the driver and not a shell
                submission_id=key.submission_id,
                # Ray passes this on to the attempt's workers.
                runtime_env={"env_vars": {MARK: key.submission_id}},
            )

    def _driver_options(self) -> list[str]:
        """Return where the driver connects, and which cluster it must find there.

        Ray itself only guesses the address, from the processes of the host. The cluster is asked
        each time, because another one may have taken its place.
        """
        identity = self._client.identity()
        address = self._gcs_address or identity.gcs_address
        options = ["--ray-cluster", identity.cluster_id]
        return [*options, "--ray-address", address] if address else options

    def stop(self, key: AttemptKey) -> None:
        """Send the driver SIGTERM, and SIGKILL if it does not end in time; Ray does both."""
        if self._is_local:
            self._traces.note(key)
        with self._reached():
            if not self.status(key).is_over:
                self._client.stop_job(key.submission_id)

    def kill(self, key: AttemptKey) -> None:
        """End all of the attempt by force; on another machine only as `stop` does."""
        try:
            self.stop(key)
        finally:
            if self._is_local:  # whatever Ray answers
                kill_processes(key.submission_id)

    def status(self, key: AttemptKey) -> RunnerStatus:
        """Return how Ray's table of jobs sees the attempt."""
        with self._reached():
            details = self._details(key)
        return RunnerStatus(state=RunnerState.UNKNOWN) if details is None else _status(details)

    def list(self) -> Mapping[AttemptKey, RunnerStatus]:
        """Return all attempts in Ray's table, without the submissions of other programs."""
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
        """Return the room of all nodes that are alive, used or not."""
        # Not filtered by Ray: it takes the dead nodes that a filter leaves out for missing ones,
        # and raises.
        with self._reached():
            nodes = _list_nodes(address=self._url, limit=_MOST_ENTRIES, detail=True)
        totals = [node.resources_total or {} for node in nodes if node.state == "ALIVE"]
        return Room(
            num_cpus=int(sum(total.get("CPU", 0) for total in totals)),
            num_gpus=int(sum(total.get("GPU", 0) for total in totals)),
            num_inverse_slots=int(sum(total.get("inverse", 0) for total in totals)),
        )

    def remains(self, key: AttemptKey) -> Sequence[Remnant]:
        """Return what still exists of the attempt in Ray's tables and on this machine."""
        found = list(self._remains_in_ray(key))
        return [*found, *self._traces.remains(key)] if self._is_local else found

    def _remains_in_ray(self, key: AttemptKey) -> Iterator[Remnant]:
        with self._reached():
            details = self._details(key)
            if details is None or details.job_id is None:
                return
            options = {"address": self._url, "limit": _MOST_ENTRIES}
            in_job = ("job_id", "=", details.job_id)
            actors = _list_actors(filters=[in_job, ("state", "!=", "DEAD")], **options)
            created_by_job = ("creator_job_id", "=", details.job_id)
            groups = _list_placement_groups(
                filters=[created_by_job, ("state", "!=", "REMOVED")], **options
            )
        for actor in actors:
            yield Remnant(description=f"actor {actor.class_name} ({actor.pid})")
        for group in groups:
            description = f"placement group {group.placement_group_id}"
            yield Remnant(description=description)

    def _details(self, key: AttemptKey) -> Any:
        """Return Ray's entry for the attempt, None if it has none."""
        try:
            return self._client.get_job_info(key.submission_id)
        except RuntimeError as error:  # Ray's client raises nothing more specific
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
            RayError,
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
    """Drop the log that Ray appends to a message; the run folder has it too."""
    lines = message.partition(", last available logs")[0].splitlines()
    return lines[0] if lines else ""
