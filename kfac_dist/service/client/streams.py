"""Streams that survive a broken connection: each continues at the token of its last answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import grpc

from kfac_dist.errors import UnreachableError
from kfac_dist.service.job_records import Job, JobEvent, LogLine, MetricSeries
from kfac_dist.service.wire.job_messages import from_log_line
from kfac_dist.service.wire.status import from_rpc_error

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 3.0
_FIRST_ANSWER_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Update:
    """News of a job that is watched; `job` is None when only events or metrics are new."""

    job: Job | None = None
    events: Sequence[JobEvent] = field(default_factory=tuple)
    metrics: Sequence[MetricSeries] = field(default_factory=tuple)


@dataclass(frozen=True, kw_only=True)
class LogBatch:
    """Lines of logs, and the token with which a later call continues after them.

    With `tail_lines`, the first batch may be empty: its token marks where the tails begin.
    """

    lines: Sequence[LogLine]
    resume_token: str


class LogStream(Iterator[LogLine]):
    """Lines of logs as they come; iterate over `batches` instead to get their tokens too."""

    def __init__(self, answers: Iterator[Any]) -> None:
        self.batches: Iterator[LogBatch] = (
            LogBatch(
                lines=[from_log_line(line) for line in answer.lines],
                resume_token=answer.resume_token,
            )
            for answer in answers
        )
        self._lines = chain.from_iterable(batch.lines for batch in self.batches)

    def __next__(self) -> LogLine:
        return next(self._lines)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a stream waits for a server that does not answer, and who hears that it waits.

    A server that has never answered is given up after a minute, even if `seconds` is longer.
    """

    seconds: float
    on_waiting: Callable[[str], object] | None = None
    """Called once each time a server that has answered before does not answer any more."""

    def give_up_after(self, *, answered: bool) -> float:
        """Return for how many seconds to wait."""
        return self.seconds if answered else min(self.seconds, _FIRST_ANSWER_SECONDS)


def resumed(
    open_stream: Callable[[str], Any], address: str, patience: Patience, token: str = ""
) -> Iterator[Any]:
    """Yield the answers of a stream, and open it again when its connection breaks.

    `open_stream` takes the token of the last answer, at first `token`.

    Raises:
        UnreachableError: the server did not answer for as long as `patience` says.
        KfacDistError: the server answered with another error.
    """
    pause = _FIRST_PAUSE_SECONDS
    lost_at: float | None = None
    answered = False
    while True:
        call = open_stream(token)
        try:
            call.initial_metadata()  # waits until the server has accepted the call, or it failed
            if call.is_active():
                lost_at, pause, answered = None, _FIRST_PAUSE_SECONDS, True
            for answer in call:
                token = answer.resume_token
                yield answer
            return
        except grpc.RpcError as error:
            meaning = from_rpc_error(error, address)
            now = time.monotonic()
            if not isinstance(meaning, UnreachableError):
                raise meaning from None
            if lost_at is None:
                lost_at = now
                if answered and patience.on_waiting is not None:
                    patience.on_waiting(meaning.message)
            if now - lost_at >= patience.give_up_after(answered=answered):
                raise meaning from None
        finally:
            call.cancel()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
