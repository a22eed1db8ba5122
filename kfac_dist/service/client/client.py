"""`kfac_dist.Client`: the commands that concern a server, as methods."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import grpc

from kfac_dist.config import JobSpec, load_spec, parse_spec
from kfac_dist.coordination.jobs.lifecycle import ENDED, JobState
from kfac_dist.errors import KfacDistError, TimedOutError, UnreachableError
from kfac_dist.runs.transfer.user_code import package_of
from kfac_dist.service.client.channel import ServerAddress
from kfac_dist.service.client.diagnosis import why_silent
from kfac_dist.service.client.streams import LogStream, Patience, Update, resumed
from kfac_dist.service.job_records import (
    Attempt,
    CheckpointFacts,
    Job,
    JobEvent,
    MetricSeries,
    check_priority,
)
from kfac_dist.service.wire import job_messages as wire
from kfac_dist.service.wire.status import from_rpc_error
from kfac_dist.service.wire.values import message_of, to_state
from kfac_dist.v1 import job_service_pb2 as pb
from kfac_dist.v1.job_service_pb2_grpc import JobServiceStub

Metadata = tuple[tuple[str, str], ...]


class Client(AbstractContextManager["Client"]):
    """A connection to a control plane. Thread-safe. Use it as a context manager, or call `close`.

    Every method raises subclasses of KfacDistError: NotFoundError for a job that does not exist,
    ConflictError for what the job's state does not permit, NotAllowedError, UnreachableError, and
    TimedOutError after `timeout_seconds` without an answer. Streams survive a restart of the
    server; they give up when it has not answered for `reconnect_seconds`.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        ca: Path | None = None,
        client_certificate: Path | None = None,
        client_key: Path | None = None,
        insecure: bool = False,
        timeout_seconds: float = 30.0,
        reconnect_seconds: float = 60.0,
        on_waiting: Callable[[str], object] | None = None,
    ) -> None:
        """Prepare a connection; the first call opens it.

        Args:
            address: HOST:PORT, or grpcs://HOST:PORT for TLS.
            token: bearer token, as `kfac-dist token create` prints it.
            ca: PEM file of the authority that signed the server's certificate, by default the
                system's authorities.
            client_certificate: PEM file of a certificate for servers that ask clients for one.
            client_key: PEM file of the key of `client_certificate`.
            insecure: permit sending the token beyond this machine without TLS.
            timeout_seconds: how long a call may take.
            reconnect_seconds: how long a stream waits for a server that does not answer any more.
            on_waiting: called with a message each time a stream begins to wait for the server.
        """
        server = ServerAddress.parse(
            address,
            ca=ca,
            client_certificate=client_certificate,
            client_key=client_key,
            insecure=insecure,
        )
        self.address = address
        self._server = server
        self._channel = server.open()
        self._stub = JobServiceStub(self._channel)
        self._metadata: Metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._timeout_seconds = timeout_seconds
        self._patience = Patience(seconds=reconnect_seconds, on_waiting=on_waiting)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; open streams end."""
        self._channel.close()

    def submit(
        self,
        spec: JobSpec | Mapping[str, Any] | Path | str,
        *,
        overrides: Sequence[str] = (),
        base_dir: Path | None = None,
        priority: int = 0,
        idempotency_key: str | None = None,
        data_dir: str | None = None,
    ) -> Job:
        """Submit a job. If its task is user code, the folder with that code is sent along.

        Args:
            spec: a specification, a mapping with its keys, or the path of its file.
            overrides: changes of the specification, as KEY=VALUE.
            base_dir: folder of the user's code, by default the folder of the file.
            priority: jobs with a higher priority leave the queue earlier.
            idempotency_key: the same key with the same request returns the job that was created
                first; by default a new key.
            data_dir: folder of data sets, an absolute path that every node has, or a URL.

        Raises:
            UsageError: the priority or another part of the request is out of range.
            InvalidSpecError: the specification or the package is wrong; lists every problem.
            ConflictError: the key was used for another request.
        """
        check_priority(priority)
        if isinstance(spec, Path | str):
            base_dir = base_dir or Path(spec).absolute().parent
            spec = load_spec(Path(spec), overrides)
        elif not isinstance(spec, JobSpec):
            spec = parse_spec(spec, overrides=overrides)
        request = message_of(
            pb.CreateJobRequest,
            spec_json=spec.model_dump_json(),
            idempotency_key=idempotency_key or secrets.token_hex(16),
            priority=priority,
            package=package_of(spec, base_dir) or b"",
            data_dir=data_dir or "",
        )
        return wire.from_job(self._call(self._stub.CreateJob, request).job)

    def get(self, job_id: str) -> Job:
        """Return a job."""
        return wire.from_job(self._get(job_id).job)

    def attempts(self, job_id: str) -> list[Attempt]:
        """Return the attempts of a job, oldest first."""
        return [wire.from_attempt(attempt) for attempt in self._get(job_id).attempts]

    def jobs(
        self,
        *,
        states: Iterable[JobState] = (),
        owner: str | None = None,
        name: str | None = None,
        page_size: int = 200,
    ) -> Iterator[Job]:
        """Yield jobs, newest first, without specification and summary.

        They are fetched in pages of `page_size`; empty filters and None do not filter.
        """
        request = message_of(
            pb.ListJobsRequest,
            states=[to_state(state) for state in states],
            owner=owner or "",
            name=name or "",
            page_size=page_size,
        )
        while True:
            page = self._call(self._stub.ListJobs, request)
            yield from (wire.from_job(job) for job in page.jobs)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def count(
        self,
        *,
        states: Iterable[JobState] = (),
        owner: str | None = None,
        name: str | None = None,
    ) -> int:
        """Return how many jobs `jobs` yields with these filters."""
        request = message_of(
            pb.ListJobsRequest,
            states=[to_state(state) for state in states],
            owner=owner or "",
            name=name or "",
            page_size=1,
        )
        return int(self._call(self._stub.ListJobs, request).total_size)

    def cancel(self, job_id: str, *, now: bool = False) -> Job:
        """End a job at a checkpoint; with `now`, kill it at once."""
        request = message_of(pb.CancelJobRequest, job_id=job_id, now=now)
        return wire.from_job(self._call(self._stub.CancelJob, request).job)

    def pause(self, job_id: str) -> Job:
        """Stop a job at a checkpoint."""
        request = message_of(pb.PauseJobRequest, job_id=job_id)
        return wire.from_job(self._call(self._stub.PauseJob, request).job)

    def resume(self, job_id: str) -> Job:
        """Resume a paused job from its newest checkpoint."""
        request = message_of(pb.ResumeJobRequest, job_id=job_id)
        return wire.from_job(self._call(self._stub.ResumeJob, request).job)

    def retry(self, job_id: str) -> Job:
        """Start a new attempt of a failed or cancelled job, from its newest checkpoint."""
        request = message_of(pb.RetryJobRequest, job_id=job_id)
        return wire.from_job(self._call(self._stub.RetryJob, request).job)

    def scale(self, job_id: str, *, gradient: int | None = None, inverse: int | None = None) -> Job:
        """Change how many workers a job shall have; None leaves that number as it is.

        Raises:
            InvalidSpecError: the job cannot have these numbers.
            ConflictError: the job has ended.
        """
        request = message_of(pb.ScaleJobRequest, job_id=job_id, gradient=gradient, inverse=inverse)
        return wire.from_job(self._call(self._stub.ScaleJob, request).job)

    def events(self, job_id: str) -> Iterator[JobEvent]:
        """Yield the events of a job, oldest first."""
        request = message_of(pb.ListEventsRequest, job_id=job_id)
        while True:
            events = self._call(self._stub.ListEvents, request).events
            if not events:
                return
            yield from (wire.from_event(event) for event in events)
            request.after = events[-1].sequence

    def metric_names(self, job_id: str) -> list[str]:
        """Return the names of the metrics that have a history in a job."""
        request = message_of(pb.QueryMetricsRequest, job_id=job_id)
        return [series.name for series in self._call(self._stub.QueryMetrics, request).series]

    def metrics(
        self,
        job_id: str,
        names: Sequence[str],
        *,
        first_step: int | None = None,
        last_step: int | None = None,
        max_points: int = 1000,
    ) -> list[MetricSeries]:
        """Return histories in the order of `names`, each thinned out to at most `max_points`.

        Both steps are included in the range; None leaves that end open.
        """
        if not names:
            return []
        request = message_of(
            pb.QueryMetricsRequest,
            job_id=job_id,
            names=names,
            first_step=first_step,
            last_step=last_step,
            max_points=max_points,
        )
        answer = self._call(self._stub.QueryMetrics, request)
        return [wire.from_series(series) for series in answer.series]

    def checkpoints(self, job_id: str) -> list[CheckpointFacts]:
        """Return the checkpoints of a job, newest first."""
        request = message_of(pb.ListCheckpointsRequest, job_id=job_id)
        answer = self._call(self._stub.ListCheckpoints, request)
        return [wire.from_checkpoint(checkpoint) for checkpoint in answer.checkpoints]

    def watch(
        self, job_id: str, *, events: bool = True, metrics: Sequence[str] = ()
    ) -> Iterator[Update]:
        """Yield the job as it is, then what is new, until the job has ended.

        `metrics` names metrics whose new points are included; `a.*` names all that begin with `a.`.
        """

        def open_stream(token: str) -> Any:
            request = message_of(
                pb.WatchJobRequest,
                job_id=job_id,
                resume_token=token,
                events=events,
                metrics=metrics,
            )
            return self._stub.WatchJob(request, metadata=self._metadata)

        for answer in resumed(open_stream, self.address, self._patience):
            yield Update(
                job=wire.from_job(answer.job) if answer.HasField("job") else None,
                events=[wire.from_event(event) for event in answer.events],
                metrics=[wire.from_series(series) for series in answer.metrics],
            )

    def wait(self, job_id: str, *, timeout_seconds: float | None = None) -> Job:
        """Wait until a job has ended, in whatever state, and return it.

        Raises:
            TimedOutError: the job has not ended after `timeout_seconds`.
        """

        def open_stream(token: str) -> Any:
            request = message_of(pb.WatchJobRequest, job_id=job_id, resume_token=token)
            return self._stub.WatchJob(request, metadata=self._metadata, timeout=timeout_seconds)

        try:
            for answer in resumed(open_stream, self.address, self._patience):
                job = wire.from_job(answer.job)
                if job.state in ENDED:
                    return job
        except TimedOutError:
            pass
        job = self.get(job_id)
        if job.state in ENDED:
            return job
        raise TimedOutError(f"job {job_id} is {job.state} after {timeout_seconds:g} s")

    def logs(
        self,
        job_id: str,
        *,
        follow: bool = False,
        roles: Iterable[str] = (),
        ranks: Iterable[int] = (),
        attempts: Iterable[int] = (),
        tail_lines: int | None = None,
        resume_token: str = "",
    ) -> LogStream:
        """Return the lines of the workers' logs, also after the job has ended.

        Args:
            job_id: the job.
            follow: wait for new lines until the job has ended.
            roles: only logs of these roles; empty for all, as for the next two.
            ranks: only logs of these ranks.
            attempts: only logs of these attempts.
            tail_lines: begin this many lines before the end of each log.
            resume_token: begin after the batch with this token.

        Raises:
            UsageError: the token does not belong to the logs of this job.
        """
        request = message_of(
            pb.StreamLogsRequest,
            job_id=job_id,
            follow=follow,
            roles=roles,
            ranks=ranks,
            attempts=attempts,
        )

        message_of(pb.StreamLogsRequest, tail_lines=tail_lines, resume_token=resume_token)

        def open_stream(token: str) -> Any:
            request.resume_token = token
            if tail_lines is None or token != resume_token:  # the token marks the tail from now on
                request.ClearField("tail_lines")
            else:
                request.tail_lines = tail_lines
            return self._stub.StreamLogs(request, metadata=self._metadata)

        return LogStream(resumed(open_stream, self.address, self._patience, resume_token))

    def _get(self, job_id: str) -> pb.GetJobResponse:
        answer: pb.GetJobResponse = self._call(
            self._stub.GetJob, message_of(pb.GetJobRequest, job_id=job_id)
        )
        return answer

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, metadata=self._metadata, timeout=self._timeout_seconds)
        except grpc.RpcError as error:
            raise self._explained(from_rpc_error(error, self.address)) from None

    def _explained(self, error: KfacDistError) -> KfacDistError:
        """Say what is wrong with the connection, where that can be found out."""
        if not isinstance(error, UnreachableError):
            return error
        why = why_silent(self._server)
        return (
            error
            if why is None
            else UnreachableError(f"{self.address}: no answer from the server: {why}")
        )
