"""StreamLogs: streams lines of the run's logs, on request until the job has ended."""

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
from kfac_dist.service.server.wakeups import JobWakeups
from kfac_dist.service.wire.job_messages import to_log_line
from kfac_dist.v1 import job_service_pb2

# A log that grows wakes nobody, so the stream polls: often after new lines, less often when quiet.
_LEAST_SECONDS = 0.2
_MOST_SECONDS = 1.0
_MAX_TAIL = 100_000


@dataclass(frozen=True, kw_only=True)
class LogStreams:
    """Serves StreamLogs."""

    jobs: Jobs
    wakeups: JobWakeups

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
        with self.wakeups.subscribed(job_id) as changed:
            while True:
                has_ended, lines, cursor = await asyncio.to_thread(
                    self._read, job_id, folder, wanted, cursor, tail
                )
                # The first answer with a tail comes even without lines: its token fixes where the
                # tail begins, so that a client that connects again misses no line.
                if lines or tail is not None:
                    yield _message(lines, cursor.encode(job_id))
                tail = None
                if lines:
                    pause = _LEAST_SECONDS
                elif has_ended or not request.follow:
                    return
                if not lines or request.follow:
                    await self.wakeups.wait(changed, 0 if lines else pause)
                    pause = min(2 * pause, _MOST_SECONDS)

    def _read(
        self, job_id: str, folder: Path, wanted: LogFilter, cursor: LogCursor, tail: int | None
    ) -> tuple[bool, list[LogLine], LogCursor]:
        """Return whether the job has ended, the next lines, and the cursor after them."""
        # The state comes first: a job that has ended here writes no line after the read below.
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
        raise requests.excludes("tail_lines", "resume_token")
    return requests.in_range("tail_lines", request.tail_lines, 0, _MAX_TAIL)


def _message(lines: list[LogLine], token: str) -> job_service_pb2.StreamLogsResponse:
    return job_service_pb2.StreamLogsResponse(
        lines=[to_log_line(line) for line in lines], resume_token=token
    )
