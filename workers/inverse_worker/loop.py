"""The one thread in which an inverse worker works, and the mailbox in front of it.

Statistics come first, so that an inverse is made of the newest there are; then one layer is
inverted; then come the snapshots that are asked for, and the mailbox is looked at again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from workers.exchange.arrays import Array
from workers.exchange.messages import InverseStatus, RefreshRequest, StatisticsHeader
from workers.exchange.parcels import StatisticsParcel
from workers.inverse_worker.work import InverseMessage, InverseWork


@dataclass(frozen=True, kw_only=True)
class _Statistics:
    header: StatisticsHeader
    parcel: StatisticsParcel | None


@dataclass(frozen=True, kw_only=True)
class _SnapshotWish:
    """A snapshot is wanted once the statistics of `step` have been dealt with."""

    step: int
    answer: Future[dict[str, Array]] = field(default_factory=Future)


_Letter = _Statistics | RefreshRequest | _SnapshotWish


class InverseLoop:
    """Feeds an `InverseWork`; every method returns at once, except `snapshot` and `lifeline`."""

    def __init__(self, work: InverseWork, publish: Callable[[InverseMessage], None]) -> None:
        self._work = work
        self._publish = publish
        self._letters: deque[_Letter] = deque()
        self._arrived = threading.Condition()
        self._wishes: list[_SnapshotWish] = []
        self._end: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="inverse-loop", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End after the layer in hand."""
        with self._arrived:
            if not self._end.done():
                self._end.set_result(None)
            self._arrived.notify_all()

    def put_statistics(self, header: StatisticsHeader, parcel: StatisticsParcel | None) -> None:
        """Hand in statistics; the arrays are kept until they are summed."""
        self._put(_Statistics(header=header, parcel=parcel))

    def put_request(self, request: RefreshRequest) -> None:
        """Hand in a refresh request."""
        self._put(request)

    def snapshot(self, step: int, timeout_seconds: float) -> dict[str, Array]:
        """Return the averages once the statistics of `step` are in them.

        Raises:
            TimeoutError: they did not come in time.
        """
        wish = _SnapshotWish(step=step)
        self._put(wish)
        return wish.answer.result(timeout=timeout_seconds)

    def lifeline(self) -> None:
        """Return when the loop is stopped; raise what ended it otherwise."""
        self._end.result()

    def status(self) -> InverseStatus:
        """Return the health of the worker, also in the middle of an inversion."""
        return self._work.status(len(self._letters))

    def _put(self, letter: _Letter) -> None:
        with self._arrived:
            self._letters.append(letter)
            self._arrived.notify_all()

    def _run(self) -> None:
        torch.set_num_threads(1)
        idle = False
        try:
            while not self._end.done():
                for letter in self._take(wait=idle):
                    self._read(letter)
                self._work.apply_statistics()
                message = self._work.invert_next()
                idle = message is None
                if message is not None:
                    self._publish(message)
                self._answer_wishes()  # before a wait: an inversion may have been what was left
        except Exception as error:  # noqa: BLE001 - whatever it is, the driver must hear of it
            self._end.set_exception(error)

    def _take(self, *, wait: bool) -> list[_Letter]:
        with self._arrived:
            if wait:
                self._arrived.wait_for(lambda: self._letters or self._end.done())
            letters = list(self._letters)
            self._letters.clear()
        return letters

    def _read(self, letter: _Letter) -> None:
        match letter:
            case _Statistics():
                self._work.receive(letter.header, letter.parcel)
            case RefreshRequest():
                self._work.request(letter)
            case _SnapshotWish():
                self._wishes.append(letter)

    def _answer_wishes(self) -> None:
        if not self._work.is_settled:
            return
        due = [wish for wish in self._wishes if wish.step <= self._work.dealt_step]
        for wish in due:
            self._wishes.remove(wish)
            wish.answer.set_result(self._work.snapshot())
