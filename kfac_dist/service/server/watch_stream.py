"""WatchJob: streams a job with its events and metrics as they come, until the job has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from kfac_dist.coordination.jobs.lifecycle import ENDED
from kfac_dist.service import opaque_tokens
from kfac_dist.service.job_records import Job, MetricSeries
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.server import requests
from kfac_dist.service.server.wakeups import JobWakeups
from kfac_dist.service.wire.job_messages import to_event, to_job, to_series
from kfac_dist.v1 import job_service_pb2

_LEAST_SECONDS = 0.2  # between two answers: a fast job takes more steps than anyone can read
_MOST_SECONDS = 5.0  # between two looks: a change made outside this process wakes nobody
_MAX_EVENTS = 500
_MAX_POINTS = 500


@dataclass(frozen=True, kw_only=True)
class WatchCursor:
    """What the reader has seen: the job's revision, the last event's sequence, the last step."""

    revision: int = 0
    event: int = 0
    step: int = 0

    def encode(self) -> str:
        """Return the cursor as a token."""
        return opaque_tokens.encode([self.revision, self.event, self.step])

    @classmethod
    def decode(cls, token: str) -> WatchCursor:
        """Return the cursor in a token; an empty token is the beginning.

        Raises:
            UsageError: `encode` did not make the token.
        """
        if not token:
            return cls()
        revision, event, step = opaque_tokens.decode("resume_token", token, _is_place)
        return cls(revision=revision, event=event, step=step)


@dataclass(frozen=True, kw_only=True)
class WatchStreams:
    """Serves WatchJob."""

    jobs: Jobs
    wakeups: JobWakeups

    async def stream(
        self, request: job_service_pb2.WatchJobRequest
    ) -> AsyncIterator[job_service_pb2.WatchJobResponse]:
        """Yield the job as it is, then what is new after every change."""
        job_id = requests.job_id(request.job_id)
        names = requests.names("metrics", request.metrics)
        cursor = WatchCursor.decode(request.resume_token)
        with self.wakeups.subscribed(job_id) as changed:
            while True:
                job, message, cursor = await asyncio.to_thread(
                    self._news, job_id, cursor, request.events, names
                )
                if message is not None:
                    yield message
                elif job.state in ENDED:
                    return
                if job.state not in ENDED:
                    await self.wakeups.wait(changed, _MOST_SECONDS)
                    await asyncio.sleep(_LEAST_SECONDS)

    def _news(
        self, job_id: str, known: WatchCursor, with_events: bool, names: Sequence[str]
    ) -> tuple[Job, job_service_pb2.WatchJobResponse | None, WatchCursor]:
        """Return the job, what is new as a message (None for nothing), and the new cursor."""
        # The job comes first: an event of a job that has ended here is found below.
        job = self.jobs.get(job_id)
        cursor = replace(known, revision=job.revision)
        message = job_service_pb2.WatchJobResponse()
        if job.revision != known.revision:
            message.job.CopyFrom(to_job(job))
        if with_events:
            events = self.jobs.events(job_id, after=known.event, limit=_MAX_EVENTS)
            message.events.extend(to_event(event) for event in events)
            cursor = replace(cursor, event=events[-1].sequence if events else known.event)
        series = self._new_points(job, known.step, names)
        if series:
            message.metrics.extend(to_series(metric) for metric in series)
            cursor = replace(cursor, step=max(metric.points[-1].step for metric in series))
        if not message.ListFields():
            return job, None, cursor
        message.resume_token = cursor.encode()
        return job, message, cursor

    def _new_points(self, job: Job, after: int, names: Sequence[str]) -> list[MetricSeries]:
        if not names:
            return []
        after = min(after, job.step)  # an attempt that resumed from a checkpoint repeats steps
        wanted = _matching(names, self.jobs.metric_names(job.id))
        series = self.jobs.metrics(job.id, wanted, first_step=after + 1, max_points=_MAX_POINTS)
        return [metric for metric in series if metric.points]


def _is_place(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(number) is int and 0 <= number < 2**62 for number in value)
    )


def _matching(names: Sequence[str], existing: Sequence[str]) -> list[str]:
    """Return the existing metrics that were asked for; `a.*` asks for all that begin with `a.`."""
    exact = set(names)
    prefixes = tuple(name[:-1] for name in names if name.endswith(".*"))
    return [name for name in existing if name in exact or (prefixes and name.startswith(prefixes))]
