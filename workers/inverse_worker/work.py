"""An inverse worker's part of the algorithm: average the factors of its layers, invert them.

No Ray and no thread: `loop` calls these verbs one at a time. The owner of the
factors and their averages; the inverses belong to the parameter server once published.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from kfac_dist.config import KFACSpec
from kfac_dist.coordination.steps.ledger import StatisticsLedger
from kfac_dist.coordination.steps.refresh import LayerRefreshState, choose_next
from kfac_dist.core.factors import FactorAverages
from kfac_dist.core.inverse.structure import structure_for
from kfac_dist.core.packing import pack_symmetric
from workers.exchange.arrays import Array, section, to_arrays, to_tensors
from workers.exchange.messages import (
    InverseHeader,
    InverseSetup,
    InverseStatus,
    JobContext,
    RefreshRequest,
    StatisticsHeader,
)
from workers.exchange.parcels import (
    InverseParcel,
    ReceivedStatistics,
    StatisticsParcel,
    add_up,
    pack_inverses,
    read_statistics,
)
from workers.inverse_worker.drift import FactorDrift
from workers.planning import staleness_bound

# What one gradient worker sent for a step.
_Message = tuple[StatisticsHeader, StatisticsParcel | None]


class InverseMessage(NamedTuple):
    """The inverses of one layer on their way to the parameter server."""

    header: InverseHeader
    parcel: InverseParcel


class InverseWork:
    """The factors of some layers, and what is asked of them.

    Each layer has averages of its own, with those of the layer it is linked to, so that layers can
    move between workers and a layer that starts afresh does not disturb the others. What a chain
    averages twice costs little beside its inverses. Averages are of packed triangles, as the sums
    travel: most steps only average.
    """

    def __init__(
        self, job: JobContext, setup: InverseSetup, averages: Mapping[str, Array] | None = None
    ) -> None:
        assert isinstance(job.spec.optimizer, KFACSpec)
        self._job = job
        self._setup = setup
        self._settings = job.spec.optimizer
        self._policy = job.spec.staleness.refresh_policy
        self._ledger = StatisticsLedger(job.spec.workers.gradient, setup.applied_step)
        self._waiting: dict[int, dict[int, _Message]] = {}
        self._dealt_step = setup.applied_step
        self._layers = {layer.name: layer for layer in setup.layers}
        self._structure = structure_for(self._settings, list(self._layers), setup.links)
        self._averages = {name: self._averages_of(name) for name in self._layers}
        self._restore(averages or {})
        self._versions: dict[str, int] = {}
        self._drift = FactorDrift()
        self._requests: deque[RefreshRequest] = deque()
        self._bound = staleness_bound(job.spec, job.replay_script)
        # Exact versions up to here are made. A successor does not know of its predecessor's.
        self._exact_step = setup.applied_step if setup.assignment_epoch == 1 else None
        self._last_chosen: str | None = None
        self._counts: Counter[str] = Counter()
        self._inversion_seconds = 0.0

    def _averages_of(self, name: str) -> FactorAverages:
        links = [link for link in self._setup.links if link.name == name]
        names = (name, *(link.next_name for link in links))
        return FactorAverages(names, self._settings.factor_decay, links)

    def _restore(self, averages: Mapping[str, Array]) -> None:
        for name, own in self._averages.items():
            state = to_tensors(section(averages, f"{name}:"))
            if state:
                own.load_state_dict(pack_symmetric(state))

    @property
    def dealt_step(self) -> int:
        """The newest step whose statistics were applied or refused."""
        return self._dealt_step

    def receive(self, header: StatisticsHeader, parcel: StatisticsParcel | None) -> None:
        """Take in a statistics message; a duplicate, late or foreign one is counted and left."""
        if not self._is_mine(header):
            self._counts["foreign"] += 1
            return
        receipt = self._ledger.receive(header.step, header.rank)
        self._counts[receipt] += 1
        if receipt == "accepted":
            self._waiting.setdefault(header.step, {})[header.rank] = (header, parcel)

    def _is_mine(self, header: StatisticsHeader) -> bool:
        return (
            header.job == self._job.job
            and header.assignment_epoch == self._setup.assignment_epoch
            and header.layers == tuple(self._layers)
        )

    def request(self, request: RefreshRequest) -> None:
        """Take over a refresh request; the newest one counts, after those that are exact."""
        if self._requests and not self._requests[-1].exact:
            self._requests.pop()
        self._requests.append(request)

    @property
    def _last_wanted_step(self) -> int | None:
        """The step whose statistics may be the newest now, for an exact version; None is any."""
        if self._exact_step is None:
            return None
        return self._bound.next_exact_refresh(self._exact_step)

    @property
    def is_settled(self) -> bool:
        """Tell whether no exact version is still to be made."""
        return not any(request.exact for request in self._requests)

    def apply_statistics(self) -> None:
        """Update the averages with every step that has become whole, in order.

        Those that an exact request must not see are left for later.
        """
        for step in self._ledger.complete_steps(self._last_wanted_step):
            messages = self._waiting.pop(step)
            self._update(step, [messages[rank] for rank in sorted(messages)])
            self._dealt_step = step
        for step in [step for step in self._waiting if step < self._ledger.applied_step]:
            del self._waiting[step]

    def _update(self, step: int, messages: Sequence[_Message]) -> None:
        sums = self._sum(messages)
        if sums is None:
            self._counts["refused"] += 1
            return
        num_cases = sum(header.num_cases for header, _ in messages)
        for averages in self._averages.values():
            averages.update(step, sums.factors, num_cases, sums.crosses)

    def _sum(self, messages: Sequence[_Message]) -> ReceivedStatistics | None:
        """Add up the ranks' sums in rank order; None when a number is not finite."""
        if not all(header.usable for header, _ in messages):
            return None
        total = add_up([parcel for _, parcel in messages if parcel is not None])
        sums = read_statistics(total)
        return sums if sums.is_finite() else None

    def invert_next(self) -> InverseMessage | None:
        """Invert the one layer that the policy puts first; None when nothing is due."""
        while self._requests and self._dealt_step >= self._requests[0].min_statistics_step:
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
        # A drift costs as much as an update of the averages, and most steps refresh nothing.
        if self._policy != "largest_drift" or not state.is_due(requested_step):
            return state
        return replace(state, drift=self._drift.of(name, self._averages[name]))

    def _invert(self, name: str, gammas: tuple[float, ...]) -> InverseMessage:
        started = time.perf_counter()
        snapshot = self._averages[name].snapshot(name)
        prepared = self._structure.invert_at_gammas(snapshot, gammas)
        self._versions[name] = snapshot.step
        if self._policy == "largest_drift":
            self._drift.start_from(name, snapshot.pair.tensors())
        seconds = time.perf_counter() - started
        self._counts["inversions"] += 1
        self._inversion_seconds += seconds
        good = [one for one in prepared if one is not None]
        header = InverseHeader(
            layer=name,
            version_step=snapshot.step,
            gammas=gammas,
            pis=tuple(None if one is None else one.pi for one in prepared),
            rungs=tuple(rung for one in good for rung in one.rungs),
            inversion_seconds=seconds,
        )
        return InverseMessage(header, pack_inverses(good))

    def snapshot(self) -> dict[str, Array]:
        """Return the averages of all layers as arrays named `layer:name`."""
        return {
            f"{name}:{key}": array
            for name, averages in self._averages.items()
            for key, array in to_arrays(averages.state_dict()).items()
        }

    def status(self, queue_depth: int) -> InverseStatus:
        """Return the worker's health, `queue_depth` being the messages in its mailbox."""
        request = self._requests[-1] if self._requests else None
        due = [
            name
            for name, averages in self._averages.items()
            if request is not None
            and request.gammas_of(name) is not None
            and self._versions.get(name, 0) < min(request.step, averages.step)
        ]
        return InverseStatus(
            rank=self._setup.rank,
            pid=os.getpid(),
            queue_depth=queue_depth + len(due),
            applied_step=self._dealt_step,
            num_inversions=self._counts["inversions"],
            inversion_seconds=self._inversion_seconds,
            duplicates=self._counts["duplicate"],
            late=self._counts["late"],
            foreign=self._counts["foreign"],
            dropped=self._ledger.dropped,
            refused=self._counts["refused"],
        )
