"""An inverse worker's part of the algorithm: average the factors of its layers and invert them.

No Ray and no thread here: `workers.inverse_worker.loop` makes one call at a time. This is the owner
of the factors and their averages. Inverses belong to the parameter server once they are sent.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace

import torch

from kfac_dist.config import KFACSpec
from kfac_dist.coordination.steps.ledger import StatisticsLedger
from kfac_dist.coordination.steps.refresh import LayerRefreshState, choose_next
from kfac_dist.core.factors import FactorAverages
from kfac_dist.core.inverse.structure import structure_for
from kfac_dist.core.packing import pack_symmetric
from workers.exchange.arrays import Array, Arrays, section, to_array, to_arrays, to_tensors
from workers.exchange.messages import (
    InverseHeader,
    InverseMessage,
    InverseSetup,
    InverseStatus,
    JobContext,
    RefreshRequest,
    StatisticsHeader,
    StatisticsMessage,
)
from workers.exchange.parcels import (
    ReceivedStatistics,
    merged,
    pack_inverses,
    read_statistics,
)
from workers.inverse_worker.drift import FactorDrift
from workers.planning import staleness_bound

_CPU = torch.device("cpu")


class InverseWork:
    """The factors of some layers, their averages, and the refreshes that were requested.

    Averages and inverses are on `device`; what arrives and leaves is on the host.

    Each layer has averages of its own, which include the factors of the layer it is linked to. So
    layers can move between workers, and a layer that starts afresh does not disturb the others. A
    chain averages its factors twice that way, which costs little compared with inverting them.
    The averages are of packed triangles, as the sums arrive, because most steps only average.
    """

    def __init__(
        self,
        job: JobContext,
        setup: InverseSetup,
        averages: Arrays | None = None,
        device: torch.device = _CPU,
    ) -> None:
        assert isinstance(job.spec.optimizer, KFACSpec)
        self.device = device
        self._job = job
        self._setup = setup
        self._settings = job.spec.optimizer
        self._policy = job.spec.staleness.refresh_policy
        self._layers = {layer.name: layer for layer in setup.layers}
        self._ledger = StatisticsLedger(
            self._layers, setup.applied_step, catches_up=setup.catches_up
        )
        self._waiting: dict[int, list[StatisticsMessage]] = {}  # by step
        self._handled_step = setup.applied_step
        self._structure = structure_for(self._settings, list(self._layers), setup.links)
        self._averages = {name: self._averages_of(name) for name in self._layers}
        self._restore(averages or {})
        self._versions: dict[str, int] = {}
        self._drift = FactorDrift()
        self._requests: deque[RefreshRequest] = deque()
        self._bound = staleness_bound(job.spec, job.replay_script)
        self._exact_step = setup.exact_step
        self._last_chosen: str | None = None
        self._counts: Counter[str] = Counter()
        self._inversion_seconds = 0.0

    def _averages_of(self, name: str) -> FactorAverages:
        links = [link for link in self._setup.links if link.name == name]
        names = (name, *(link.next_name for link in links))
        return FactorAverages(names, self._settings.factor_decay, links)

    def _restore(self, averages: Arrays) -> None:
        for name, own in self._averages.items():
            state = to_tensors(section(averages, f"{name}:"), self.device)
            if state:
                own.load_state_dict(pack_symmetric(state))

    def expect(self, steps: Sequence[int]) -> None:
        """Average these steps, which are sent again, before any later one."""
        self._ledger.expect(steps)

    def reassigned(self, setup: InverseSetup, averages: Arrays) -> InverseWork:
        """Return the work for the layers of `setup`, with `averages` of those that are new here.

        What is known of the layers that stay is kept, and so are the counts. The caller makes sure
        that the averages contain all statistics that have been sent.
        """
        work = InverseWork(self._job, setup, {**self.snapshot(), **averages})
        work._versions = {n: v for n, v in self._versions.items() if n in work._layers}
        work._drift = self._drift.of(work._layers)
        work._requests = self._requests
        work._counts = self._counts
        work._ledger.dropped = self._ledger.dropped
        work._inversion_seconds = self._inversion_seconds
        return work

    @property
    def handled_step(self) -> int:
        """The newest step whose statistics were averaged or refused."""
        return self._handled_step

    def receive(self, message: StatisticsMessage) -> None:
        """Keep a statistics message; count and ignore a duplicate, late or foreign one."""
        header = message.header
        if not self._is_mine(header):
            self._counts["foreign"] += 1
            return
        receipt = self._ledger.receive(header.step, header.layers)
        self._counts[receipt] += 1
        if receipt == "accepted":
            self._waiting.setdefault(header.step, []).append(message)

    def _is_mine(self, header: StatisticsHeader) -> bool:
        return (
            header.job == self._job.job
            and header.assignment_epoch == self._setup.assignment_epoch
            and self._layers.keys() >= set(header.layers)
        )

    def request(self, request: RefreshRequest) -> None:
        """Add a refresh request; it replaces the one before, unless that one is exact."""
        if self._requests and not self._requests[-1].exact:
            self._requests.pop()
        self._requests.append(request)

    @property
    def _last_wanted_step(self) -> int | None:
        """The last step to average before the next exact version; None if there is no limit."""
        if self._exact_step is None:
            return None
        return self._bound.next_exact_refresh(self._exact_step)

    @property
    def is_settled(self) -> bool:
        """Whether every exact version that was requested has been made."""
        return not any(request.exact for request in self._requests)

    def apply_statistics(self) -> None:
        """Update the averages with every step for which all messages have come, in order.

        Statistics that the next exact version must not contain are left for later.
        """
        for step in self._ledger.complete_steps(self._last_wanted_step):
            self._update(step, self._waiting.pop(step))
            self._handled_step = step
        # Steps of which some messages never came; the ledger counts them as dropped.
        for step in [step for step in self._waiting if step < self._ledger.applied_step]:
            del self._waiting[step]

    def _update(self, step: int, messages: Sequence[StatisticsMessage]) -> None:
        sums = self._sums(messages)
        if sums is None:
            self._counts["refused"] += 1
            return
        num_cases = messages[0].header.num_cases
        for averages in self._averages.values():
            averages.update(step, sums.factors, num_cases, sums.crosses)

    def _sums(self, messages: Sequence[StatisticsMessage]) -> ReceivedStatistics | None:
        """Return the sums of all layers; None if a number is not finite."""
        if not all(message.header.usable for message in messages):
            return None
        parcels = [message.parcel for message in messages if message.parcel is not None]
        sums = read_statistics(merged(parcels), self.device)
        return sums if sums.is_finite() else None

    def invert_next(self) -> InverseMessage | None:
        """Invert the layer that the policy puts first; return None if no layer is due."""
        while self._requests and self._handled_step >= self._requests[0].min_statistics_step:
            request = self._requests[0]
            wanted = {
                name: gammas
                for name in self._averages
                if (gammas := request.gammas_of(name)) is not None
            }
            states = [self._refresh_state(name, request.step) for name in wanted]
            name = choose_next(states, self._policy, request.step, self._last_chosen)
            if name is not None:
                self._last_chosen = name
                return self._invert(name, wanted[name])
            if not request.exact:
                return None
            # Every layer has its exact version, so later statistics may be averaged now.
            self._exact_step = self._requests.popleft().step
            self.apply_statistics()
        return None

    def _refresh_state(self, name: str, requested_step: int) -> LayerRefreshState:
        state = LayerRefreshState(
            name=name,
            version=self._versions.get(name),
            statistics_step=self._averages[name].step,
            drift=0.0,
            cost=self._setup.cost_model.layer_seconds(self._layers[name]),
        )
        # Computing a drift takes as long as updating the averages, so only layers that are due get
        # one; most steps refresh no layer.
        if self._policy != "largest_drift" or not state.is_due(requested_step):
            return state
        return replace(state, drift=self._drift.since_inverted(name, self._averages[name]))

    def _invert(self, name: str, gammas: tuple[float, ...]) -> InverseMessage:
        started = time.perf_counter()
        snapshot = self._averages[name].snapshot(name)
        prepared = self._structure.invert_at_gammas(snapshot, gammas)
        self._versions[name] = snapshot.step
        if self._policy == "largest_drift":
            self._drift.start_from(name, snapshot.pair.tensors())
        seconds = time.perf_counter() - started
        self._inversion_seconds += seconds
        made = [inverted for inverted in prepared if inverted is not None]
        header = InverseHeader(
            layer=name,
            version_step=snapshot.step,
            gammas=gammas,
            pis=tuple(None if inverted is None else inverted.pi for inverted in prepared),
            rungs=tuple(rung for inverted in made for rung in inverted.rungs),
            inversion_seconds=seconds,
        )
        return InverseMessage(header=header, parcel=pack_inverses(made))

    def snapshot(self) -> dict[str, Array]:
        """Return the averages of all layers, as arrays with names `layer:name`."""
        return {
            f"{name}:{key}": array
            for name, averages in self._averages.items()
            for key, array in to_arrays(averages.state_dict()).items()
        }

    def copy(self, least_step: int) -> dict[str, Array] | None:
        """Return the averages like `snapshot`, packed; None before `least_step`."""
        if self._handled_step < max(least_step, 1):
            return None
        return {
            f"{name}:{key}": to_array(value)
            for name, averages in self._averages.items()
            for key, value in averages.packed_state_dict().items()
        }

    def status(self, queue_depth: int) -> InverseStatus:
        """Return the worker's health; `queue_depth` is the number of messages in its mailbox."""
        request = self._requests[-1] if self._requests else None
        due = [
            name
            for name, averages in self._averages.items()
            if request is not None
            and request.gammas_of(name) is not None
            and self._versions.get(name, 0) < min(request.step, averages.step)
        ]
        return InverseStatus(
            pid=os.getpid(),
            queue_depth=queue_depth + len(due),
            inversion_seconds=self._inversion_seconds,
            duplicates=self._counts["duplicate"],
            late=self._counts["late"],
            foreign=self._counts["foreign"],
            dropped=self._ledger.dropped,
            refused=self._counts["refused"],
        )
