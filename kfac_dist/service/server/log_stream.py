"""StreamLogs: lines from the run's folder, followed until the job has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from kfac_dist.coordination.jobs.lifecycle import ENDED
from kfac_dist.service.job_records import LogLine
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.logs import LogCursor, LogFilter, read_lines
from kfac_dist.service.server import requests
from kfac_dist.service.server.wakeups import Changes
from kfac_dist.service.wire.job_messages import to_log_line
from kfac_dist.v1 import job_service_pb2

# Nobody tells when a log grows, so it is looked at: soon after it grew, later when it is quiet.
_LEAST_SECONDS = 0.2
_MOST_SECONDS = 1.0
_MAX_TAIL = 100_000


@dataclass(frozen=True, kw_only=True)
class LogStreams:
    """Streams of logs."""

    jobs: Jobs
    changes: Changes

    async def stream(
        self, request: job_service_pb2.StreamLogsRequest
    ) -> AsyncIterator[job_service_pb2.StreamLogsResponse]:
        """Yield batches of lines."""
        job_id = requests.job_id(request.job_id)
        wanted = _filter(request)
        tail = _tail(request)
        cursor = LogCursor.decode(request.resume_token, job_id)
        folder = await asyncio.to_thread(self.jobs.log_dir, job_id)
        pause = _LEAST_SECONDS
        with self.changes.of(job_id) as changed:
            while True:
                has_ended, lines, cursor = await asyncio.to_thread(
                    self._read, job_id, folder, wanted, cursor, tail
                )
                if lines or tail is not None:  # no line is lost from where the tail begins
                    yield _message(lines, cursor.encode(job_id))
                tail = None
                if lines:
                    pause = _LEAST_SECONDS
                elif has_ended or not request.follow:
                    return
                if not lines or request.follow:
                    await self.changes.wait(changed, 0 if lines else pause)
                    pause = min(2 * pause, _MOST_SECONDS)

    def _read(
        self, job_id: str, folder: Path, wanted: LogFilter, cursor: LogCursor, tail: int | None
    ) -> tuple[bool, list[LogLine], LogCursor]:
        """Read on; the state is read first, so that at the end nothing is missed."""
        has_ended = self.jobs.get(job_id).state in ENDED
        lines, cursor = read_lines(folder, wanted, cursor, complete=has_ended, tail_lines=tail)
        return has_ended, lines, cursor


def _filter(request: job_service_pb2.StreamLogsRequest) -> LogFilter:
    return LogFilter(
        roles=frozenset(requests.at_most("roles", request.roles)),
        ranks=frozenset(requests.at_most("ranks", request.ranks)),
        attempts=frozenset(requests.at_most("attempts", request.attempts)),
    )


def _tail(request: job_service_pb2.StreamLogsRequest) -> int | None:
    if not request.HasField("tail_lines"):
        return None
    if request.resume_token:
        raise requests.no_both("tail_lines", "resume_token")
    return requests.in_range("tail_lines", request.tail_lines, 0, _MAX_TAIL)


def _message(lines: list[LogLine], token: str) -> job_service_pb2.StreamLogsResponse:
    return job_service_pb2.StreamLogsResponse(
        lines=[to_log_line(line) for line in lines], resume_token=token
    )
