"""What a member sends to inverse workers: statistics, and requests for new inverses.

Nothing is lost with an inverse worker. What it has been sent since the newest copy of its averages
is kept here, and is sent again to the worker that takes over.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError

from kfac_dist.coordination.steps.kept_statistics import KeptMessage, KeptStatistics
from workers.actor import Handle, Ref
from workers.exchange.messages import RefreshRequest, StatisticsHeader, StatisticsMessage
from workers.exchange.parcels import flat_arrays

# A message is normally there in a millisecond. An inverse worker that has stalled holds a step up
# once, and is not waited for again until it answers.
_ARRIVAL_SECONDS = 1.0
_MOST_KEPT_BYTES = 512 * 2**20
_INLINE_BYTES = 100 * 1024  # Ray sends smaller arguments inside the call
_MOST_REQUESTS = 1000  # more than are open while a worker is replaced


@dataclass(frozen=True, kw_only=True)
class SentReport:
    """What a member has sent to a new inverse worker: the layers by step.

    `last_step` is the last step whose statistics it has sent to anybody, None before the first.
    """

    last_step: int | None
    layers: Mapping[int, tuple[str, ...]]


class _Content(NamedTuple):
    header: StatisticsHeader
    parcel: Any  # a parcel, or a reference to one in the object store


class Outbox:
    """Sends to the inverse workers that `connect` names; calls may come from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handles: Mapping[int, Handle] = {}
        self._epochs: Mapping[int, int] = {}
        self._unanswered: dict[int, list[Ref]] = {}
        self._kept: KeptStatistics[_Content] = KeptStatistics(_MOST_KEPT_BYTES)
        self._copied_steps: dict[int, int] = {}
        self._to_new: dict[int, dict[int, tuple[str, ...]]] = {}  # what those got that catch up
        self._requests: list[RefreshRequest] = []
        self._sent_step: int | None = None

    def connect(
        self,
        handles: Mapping[int, Handle],
        epochs: Mapping[int, int],
        copied_steps: Mapping[int, int],
    ) -> None:
        """Send to these workers from now on; those that are new get first what they lack.

        Args:
            handles: the inverse workers, by rank.
            epochs: distinguishes each from its predecessors.
            copied_steps: the averages of each worker contain the statistics up to this step, in a
                copy that outlives the worker.
        """
        with self._lock:
            new = [rank for rank in handles if self._epochs.get(rank) != epochs[rank]]
            self._handles, self._epochs = dict(handles), dict(epochs)
            self._copied_steps = dict(copied_steps)
            self._unanswered = {r: u for r, u in self._unanswered.items() if r not in new}
            self._forget()
            for rank in new:
                self._send_again(rank, copied_steps[rank])

    def _send_again(self, rank: int, step: int) -> None:
        self._to_new[rank] = {}
        newer = self._kept.newer_than(rank, step)
        refs = [self._post(rank, message.content) for message in newer]
        for request in self._requests:
            # Earlier exact versions have been delivered before later statistics were averaged.
            if request.step >= step or not request.exact:
                self._handles[rank].refresh.remote(request)
        # It may only be starting, and is not waited for before it has answered.
        self._unanswered[rank] = refs or [self._handles[rank].status.remote()]

    def report(self, rank: int) -> SentReport:
        """Return what a new inverse worker, which has started now, was sent so far.

        What it is sent from now on is waited for.
        """
        with self._lock:
            self._unanswered.pop(rank, None)
            return SentReport(last_step=self._sent_step, layers=self._to_new.pop(rank, {}))

    def rewind(self, step: int) -> None:
        """Expect the steps after `step` to be sent once more."""
        with self._lock:
            if self._sent_step is not None:
                self._sent_step = min(step, self._sent_step)

    def forget(self, copied_steps: Mapping[int, int]) -> None:
        """Forget what is now in copies of the averages."""
        with self._lock:
            self._copied_steps |= copied_steps
            self._forget()

    def _forget(self) -> None:
        for rank, step in self._copied_steps.items():
            self._kept.forget(rank, step)

    def send(self, step: int, messages: Mapping[int, list[StatisticsMessage]]) -> None:
        """Send the messages of a step and wait until they have arrived.

        A step that is applied then has its statistics at their owners. The messages
        may be changed once this returns.
        """
        waited_for: list[Ref] = []
        with self._lock:
            for rank, own in messages.items():
                self._note_answers(rank)
                silent = bool(self._unanswered.get(rank))
                refs = [self._post(rank, self._keep(rank, message)) for message in own]
                self._unanswered[rank] = [*self._unanswered.get(rank, []), *refs]
                if not silent:
                    waited_for += refs
            self._sent_step = max(step, self._sent_step or 0)
        if waited_for:
            ray.wait(waited_for, num_returns=len(waited_for), timeout=_ARRIVAL_SECONDS)

    def _keep(self, rank: int, message: StatisticsMessage) -> _Content:
        header, parcel = message.header, message.parcel
        num_bytes = 0 if parcel is None else sum(array.nbytes for array in flat_arrays(parcel))
        is_small = num_bytes < _INLINE_BYTES
        content = _Content(header, deepcopy(parcel) if is_small else ray.put(parcel))
        self._kept.add(
            KeptMessage(
                step=header.step,
                inverse_worker=rank,
                layers=header.layers,
                num_bytes=num_bytes,
                content=content,
            )
        )
        return content

    def _post(self, rank: int, content: _Content) -> Ref:
        header = replace(content.header, assignment_epoch=self._epochs[rank])
        if (own := self._to_new.get(rank)) is not None:
            own[header.step] = (*own.get(header.step, ()), *header.layers)
        sent: Ref = self._handles[rank].update.remote(header, content.parcel)
        return sent

    def _note_answers(self, rank: int) -> None:
        """Forget the messages to an inverse worker that have arrived, or that it died with."""
        refs = self._unanswered.get(rank)
        if not refs:
            return
        answered, self._unanswered[rank] = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in answered:
            try:
                ray.get(ref)
            except RayActorError:
                continue  # the driver learns of the death by itself

    def request(self, request: RefreshRequest) -> None:
        """Ask all inverse workers for a refresh."""
        with self._lock:
            oldest = min(self._copied_steps.values(), default=0)
            open_ones = [r for r in self._requests if r.exact and r.step >= oldest]
            self._requests = [*open_ones, request][-_MOST_REQUESTS:]
            for handle in self._handles.values():
                handle.refresh.remote(request)
