"""The one thread in which an inverse worker works, and the mailbox in front of it.

Each turn of the loop averages the statistics that have arrived, so that an inverse contains the
newest ones; then inverts one layer; then answers the snapshots that are due
(docs/algorithm.md#asynchrony).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from kfac_dist.optim.arithmetic import full_precision
from workers.device import computing_on
from workers.exchange.arrays import Array, Arrays
from workers.exchange.messages import (
    InverseMessage,
    InverseSetup,
    InverseStatus,
    RefreshRequest,
    StatisticsMessage,
)
from workers.heartbeat import Heartbeat, waiting
from workers.inverse_worker.work import InverseWork


@dataclass(frozen=True, kw_only=True)
class _SnapshotRequest:
    """Asks for a snapshot, once the statistics of `step` have been averaged or refused."""

    step: int
    answer: Future[dict[str, Array]] = field(default_factory=Future)


@dataclass(frozen=True, kw_only=True)
class _Reassignment:
    """Gives the worker other layers, with the averages of those that are new to it."""

    setup: InverseSetup
    averages: Arrays
    answer: Future[None] = field(default_factory=Future)


@dataclass(frozen=True, kw_only=True)
class _CopyRequest:
    """Asks for a copy of the averages as they are, if they contain `least_step`."""

    least_step: int
    answer: Future[dict[str, Array] | None] = field(default_factory=Future)


@dataclass(frozen=True, kw_only=True)
class _Expectation:
    """Tells which steps are sent again."""

    steps: Sequence[int]


_Letter = (
    StatisticsMessage
    | RefreshRequest
    | _SnapshotRequest
    | _Reassignment
    | _CopyRequest
    | _Expectation
)


class InverseLoop:
    """Runs an `InverseWork` in a thread of its own, whose doings `heartbeat` tells.

    Every method returns at once, except `snapshot`, `copy`, `reassign` and `lifeline`.
    """

    def __init__(self, work: InverseWork, publish: Callable[[InverseMessage], None]) -> None:
        self.heartbeat = Heartbeat()
        self._work = work
        self._publish = publish
        self._letters: deque[_Letter] = deque()
        self._arrived = threading.Condition()
        self._snapshot_requests: list[_SnapshotRequest] = []
        self._end: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="inverse-loop", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the layer that is being inverted."""
        with self._arrived:
            if not self._end.done():
                self._end.set_result(None)
            self._arrived.notify_all()

    def put_statistics(self, message: StatisticsMessage) -> None:
        """Put statistics into the mailbox; the arrays are kept until they are summed."""
        self._put(message)

    def put_request(self, request: RefreshRequest) -> None:
        """Put a refresh request into the mailbox."""
        self._put(request)

    def snapshot(self, step: int, timeout_seconds: float) -> dict[str, Array]:
        """Return the averages, once they contain the statistics of `step`.

        Raises:
            TimeoutError: the statistics did not arrive in time.
        """
        request = _SnapshotRequest(step=step)
        self._put(request)
        return request.answer.result(timeout=timeout_seconds)

    def copy(self, least_step: int, timeout_seconds: float) -> dict[str, Array] | None:
        """Return the averages, packed, as soon as no layer is being inverted.

        None if they do not contain the statistics of `least_step`.

        Raises:
            TimeoutError: an inversion took too long.
        """
        request = _CopyRequest(least_step=least_step)
        self._put(request)
        return request.answer.result(timeout=timeout_seconds)

    def expect(self, steps: Sequence[int]) -> None:
        """Average these steps, which are sent again, before any later one."""
        self._put(_Expectation(steps=steps))

    def reassign(self, setup: InverseSetup, averages: Arrays, timeout_seconds: float) -> None:
        """Return once the worker owns the layers of `setup`.

        Raises:
            TimeoutError: it did not come to that in time.
        """
        reassignment = _Reassignment(setup=setup, averages=averages)
        self._put(reassignment)
        reassignment.answer.result(timeout=timeout_seconds)

    def lifeline(self) -> None:
        """Return when the loop is stopped, or raise what ended it."""
        self._end.result()

    def status(self) -> InverseStatus:
        """Return the health of the worker, even in the middle of an inversion."""
        return self._work.status(len(self._letters))

    def _put(self, letter: _Letter) -> None:
        with self._arrived:
            self._letters.append(letter)
            self._arrived.notify_all()

    def _run(self) -> None:
        torch.set_num_threads(1)
        try:
            with self.heartbeat.doing("inverses"), computing_on(self._work.device):
                self._work_on()
        except Exception as error:  # noqa: BLE001 - the driver must learn of any error
            self._end.set_exception(error)

    def _work_on(self) -> None:
        idle = False
        while not self._end.done():
            for letter in self._collect(wait=idle):
                self._read(letter)
            self.heartbeat.beat("average and invert")
            message = self._work_once()
            idle = message is None
            if message is not None:
                self._publish(message)
            # Before the loop waits again: a snapshot may have waited for this inversion alone.
            self._answer_snapshots()

    def _work_once(self) -> InverseMessage | None:
        with full_precision(self._work.device):
            self._work.apply_statistics()
            return self._work.invert_next()

    def _collect(self, *, wait: bool) -> list[_Letter]:
        """Empty the mailbox; with `wait`, wait for the first letter."""
        with self._arrived:
            if wait:
                with waiting():
                    self._arrived.wait_for(lambda: self._letters or self._end.done())
            letters = list(self._letters)
            self._letters.clear()
        return letters

    def _read(self, letter: _Letter) -> None:
        match letter:
            case StatisticsMessage():
                self._work.receive(letter)
            case RefreshRequest():
                self._work.request(letter)
            case _SnapshotRequest():
                self._snapshot_requests.append(letter)
            case _Reassignment():
                self._work = self._work.reassigned(letter.setup, letter.averages)
                letter.answer.set_result(None)
            case _CopyRequest():
                letter.answer.set_result(self._work.copy(letter.least_step))
            case _Expectation():
                self._work.expect(letter.steps)

    def _answer_snapshots(self) -> None:
        # A resumed job does not repeat old requests, so every exact version that was asked for has
        # to be made before the snapshot.
        if not self._work.is_settled:
            return
        handled = self._work.handled_step
        for request in [due for due in self._snapshot_requests if due.step <= handled]:
            self._snapshot_requests.remove(request)
            request.answer.set_result(self._work.snapshot())
