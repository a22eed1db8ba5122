"""The calls of JobService that have a single answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kfac_dist.runs.checkpoint_folder import CheckpointInfo
from kfac_dist.service.access.caller import Caller
from kfac_dist.service.job_records import CheckpointFacts, Job, Role
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.server import requests
from kfac_dist.service.server.calls import Stream, Unary
from kfac_dist.service.server.log_stream import LogStreams
from kfac_dist.service.server.watch_stream import WatchStreams
from kfac_dist.service.wire.job_messages import (
    to_attempt,
    to_checkpoint,
    to_event,
    to_job,
    to_series,
)
from kfac_dist.service.wire.values import optional
from kfac_dist.v1 import job_pb2
from kfac_dist.v1 import job_service_pb2 as pb

_PAGE_SIZE = 50
SERVICE = pb.DESCRIPTOR.services_by_name["JobService"].full_name


@dataclass(frozen=True, kw_only=True)
class JobCalls:
    """One method for each call: it checks the request, then asks `jobs`."""

    jobs: Jobs

    def create(self, request: pb.CreateJobRequest, caller: Caller) -> pb.CreateJobResponse:
        """Accept a job."""
        job = self.jobs.create(
            requests.spec(request.spec_json),
            owner=caller.name,
            priority=request.priority,
            idempotency_key=request.idempotency_key or None,
            package=request.package or None,
            data_dir=request.data_dir or None,
        )
        return pb.CreateJobResponse(job=to_job(job))

    def get(self, request: pb.GetJobRequest, caller: Caller) -> pb.GetJobResponse:
        """Return a job with its attempts."""
        job_id = requests.job_id(request.job_id)
        job = to_job(self.jobs.get(job_id))
        attempts = [to_attempt(attempt) for attempt in self.jobs.attempts(job_id)]
        return pb.GetJobResponse(job=job, attempts=attempts)

    def list(self, request: pb.ListJobsRequest, caller: Caller) -> pb.ListJobsResponse:
        """Return a page of jobs."""
        states = requests.states(requests.at_most("states", request.states))
        owner, name = request.owner or None, request.name or None
        page, token = self.jobs.list(
            states=states,
            owner=owner,
            name=name,
            page_size=request.page_size or _PAGE_SIZE,
            page_token=request.page_token,
        )
        is_first = not request.page_token
        return pb.ListJobsResponse(
            jobs=[to_job(job, whole=False) for job in page],
            next_page_token=token,
            total_size=self.jobs.count(states=states, owner=owner, name=name) if is_first else 0,
        )

    def cancel(self, request: pb.CancelJobRequest, caller: Caller) -> pb.CancelJobResponse:
        """End a job."""
        job = self._control(
            request.job_id,
            caller,
            "cancel",
            lambda job_id: self.jobs.cancel(job_id, now=request.now),
        )
        return pb.CancelJobResponse(job=to_job(job))

    def pause(self, request: pb.PauseJobRequest, caller: Caller) -> pb.PauseJobResponse:
        """Stop a job at a checkpoint."""
        job = self._control(request.job_id, caller, "pause", self.jobs.pause)
        return pb.PauseJobResponse(job=to_job(job))

    def resume(self, request: pb.ResumeJobRequest, caller: Caller) -> pb.ResumeJobResponse:
        """Resume a paused job."""
        job = self._control(request.job_id, caller, "resume", self.jobs.resume)
        return pb.ResumeJobResponse(job=to_job(job))

    def retry(self, request: pb.RetryJobRequest, caller: Caller) -> pb.RetryJobResponse:
        """Start a new attempt of an ended job."""
        job = self._control(request.job_id, caller, "retry", self.jobs.retry)
        return pb.RetryJobResponse(job=to_job(job))

    def scale(self, request: pb.ScaleJobRequest, caller: Caller) -> pb.ScaleJobResponse:
        """Change the number of workers of a job."""
        gradient, inverse = optional(request, "gradient"), optional(request, "inverse")
        job = self._control(
            request.job_id,
            caller,
            "scale",
            lambda job_id: self.jobs.scale(job_id, gradient=gradient, inverse=inverse),
        )
        return pb.ScaleJobResponse(job=to_job(job))

    def metrics(self, request: pb.QueryMetricsRequest, caller: Caller) -> pb.QueryMetricsResponse:
        """Return the history of the named metrics; without names, the names of all metrics."""
        job_id = requests.job_id(request.job_id)
        names = requests.names("names", request.names)
        if not names:
            existing = self.jobs.metric_names(job_id)
            series = [job_pb2.MetricSeries(name=name, sampled_every=1) for name in existing]
            return pb.QueryMetricsResponse(series=series)
        first, last = request.first_step, request.last_step
        found = self.jobs.metrics(
            job_id,
            names,
            first_step=first if request.HasField("first_step") else None,
            last_step=last if request.HasField("last_step") else None,
            max_points=requests.in_range("max_points", request.max_points, 1, 10_000, default=1000),
        )
        return pb.QueryMetricsResponse(series=[to_series(metric) for metric in found])

    def events(self, request: pb.ListEventsRequest, caller: Caller) -> pb.ListEventsResponse:
        """Return the events of a job."""
        events = self.jobs.events(
            requests.job_id(request.job_id),
            after=request.after,
            limit=requests.in_range("page_size", request.page_size, 1, 1000, default=500),
        )
        return pb.ListEventsResponse(events=[to_event(event) for event in events])

    def checkpoints(
        self, request: pb.ListCheckpointsRequest, caller: Caller
    ) -> pb.ListCheckpointsResponse:
        """Return the checkpoints of a job."""
        found = self.jobs.checkpoints(requests.job_id(request.job_id))
        facts = [fact for info in found if (fact := _measured(info)) is not None]
        return pb.ListCheckpointsResponse(checkpoints=[to_checkpoint(fact) for fact in facts])

    def _control(
        self, job_id: str, caller: Caller, what: str, request: Callable[[str], Job]
    ) -> Job:
        """Call `request` if the caller owns the job or is an admin."""
        caller.require_control_of(self.jobs.get(requests.job_id(job_id)), what)
        return request(job_id)


def job_methods(
    calls: JobCalls, watches: WatchStreams, logs: LogStreams
) -> dict[str, Unary | Stream]:
    """Return the methods of JobService with the role that each one needs."""
    viewer, submitter = Role.VIEWER, Role.SUBMITTER
    return {
        "CreateJob": Unary(request=pb.CreateJobRequest, role=submitter, function=calls.create),
        "GetJob": Unary(request=pb.GetJobRequest, role=viewer, function=calls.get),
        "ListJobs": Unary(request=pb.ListJobsRequest, role=viewer, function=calls.list),
        "CancelJob": Unary(request=pb.CancelJobRequest, role=submitter, function=calls.cancel),
        "PauseJob": Unary(request=pb.PauseJobRequest, role=submitter, function=calls.pause),
        "ResumeJob": Unary(request=pb.ResumeJobRequest, role=submitter, function=calls.resume),
        "RetryJob": Unary(request=pb.RetryJobRequest, role=submitter, function=calls.retry),
        "ScaleJob": Unary(request=pb.ScaleJobRequest, role=submitter, function=calls.scale),
        "QueryMetrics": Unary(request=pb.QueryMetricsRequest, role=viewer, function=calls.metrics),
        "ListEvents": Unary(request=pb.ListEventsRequest, role=viewer, function=calls.events),
        "ListCheckpoints": Unary(
            request=pb.ListCheckpointsRequest, role=viewer, function=calls.checkpoints
        ),
        "WatchJob": Stream(request=pb.WatchJobRequest, role=viewer, function=watches.stream),
        "StreamLogs": Stream(request=pb.StreamLogsRequest, role=viewer, function=logs.stream),
    }


def _measured(info: CheckpointInfo) -> CheckpointFacts | None:
    """Return a checkpoint with its size, None if the run has deleted it since it was listed."""
    try:
        created = info.path.stat().st_mtime
        size = sum(path.stat().st_size for path in info.path.rglob("*") if path.is_file())
    except FileNotFoundError:
        return None
    return CheckpointFacts(step=info.step, path=str(info.path), size_bytes=size, created_at=created)
