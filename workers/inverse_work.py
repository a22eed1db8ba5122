"""An inverse worker's part of the algorithm: average the factors of its layers, invert them.

No Ray and no thread: `workers.inverse_loop` calls these verbs one at a time. The owner of the
factors and their averages; the inverses belong to the parameter server once published.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch

from kfac_dist.config import KFACSpec
from kfac_dist.coordination.ledger import StatisticsLedger
from kfac_dist.coordination.refresh import LayerRefreshState, choose_next
from kfac_dist.core.factors import FactorAverages, KroneckerPair
from kfac_dist.core.inverse import InversionFailedError, InvertedPair, invert_pair
from workers.messages import (
    InverseHeader,
    InverseSetup,
    InverseStatus,
    JobContext,
    RefreshRequest,
    StatisticsHeader,
)
from workers.transport import Array, pack_pairs, section, to_arrays, to_tensors, unpack_pairs


class InverseMessage(NamedTuple):
    """The inverses of one layer on their way to the parameter server."""

    header: InverseHeader
    array: Array


class InverseWork:
    """The factors of some layers, and what is asked of them.

    Each layer has averages of its own, so that layers can move between workers and a layer that
    starts afresh does not disturb the others.
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
        self._waiting: dict[int, dict[int, tuple[StatisticsHeader, Array | None]]] = {}
        self._dealt_step = setup.applied_step
        self._averages = {
            layer.name: FactorAverages((layer.name,), self._settings.factor_decay)
            for layer in setup.layers
        }
        self._restore(averages or {})
        self._versions: dict[str, int] = {}
        self._inverted_factors: dict[str, KroneckerPair] = {}
        self._drifts: dict[str, tuple[int, float]] = {}
        self._request: RefreshRequest | None = None
        self._last_chosen: str | None = None
        self._counts: Counter[str] = Counter()
        self._inversion_seconds = 0.0

    def _restore(self, averages: Mapping[str, Array]) -> None:
        for name, own in self._averages.items():
            state = to_tensors(section(averages, f"{name}:"))
            if state:
                own.load_state_dict(state)

    @property
    def dealt_step(self) -> int:
        """The newest step whose statistics were applied or refused."""
        return self._dealt_step

    def receive(self, header: StatisticsHeader, array: Array | None) -> None:
        """Take in a statistics message; a duplicate, late or foreign one is counted and left."""
        if not self._is_mine(header):
            self._counts["foreign"] += 1
            return
        receipt = self._ledger.receive(header.step, header.rank)
        self._counts[receipt] += 1
        if receipt == "accepted":
            self._waiting.setdefault(header.step, {})[header.rank] = (header, array)

    def _is_mine(self, header: StatisticsHeader) -> bool:
        return (
            header.job == self._job.job
            and header.assignment_epoch == self._setup.assignment_epoch
            and header.layers == tuple(layer.name for layer in self._setup.layers)
        )

    def request(self, request: RefreshRequest) -> None:
        """Take over a refresh request; the newest one counts."""
        self._request = request

    def apply_statistics(self) -> None:
        """Update the averages with every step that has become whole, in order."""
        for step in self._ledger.complete_steps():
            messages = self._waiting.pop(step)
            self._update(step, [messages[rank] for rank in sorted(messages)])
            self._dealt_step = step
        for step in [step for step in self._waiting if step < self._ledger.applied_step]:
            del self._waiting[step]

    def _update(self, step: int, messages: list[tuple[StatisticsHeader, Array | None]]) -> None:
        sums = self._sum(messages)
        if sums is None:
            self._counts["refused"] += 1
            return
        num_cases = sum(header.num_cases for header, _ in messages)
        for averages in self._averages.values():
            averages.update(step, sums, num_cases)

    def _sum(
        self, messages: list[tuple[StatisticsHeader, Array | None]]
    ) -> dict[str, KroneckerPair] | None:
        """Add up the ranks' sums in rank order; None when a number is not finite."""
        if not all(header.usable for header, _ in messages):
            return None
        arrays = [array for _, array in messages if array is not None]
        total = arrays[0]
        for array in arrays[1:]:
            total = total + array
        sums = unpack_pairs(total, self._setup.layers)
        return sums if all(pair.is_finite() for pair in sums.values()) else None

    def invert_next(self) -> InverseMessage | None:
        """Invert the one layer that the policy puts first; None when nothing is due."""
        request = self._request
        if request is None or self._dealt_step < request.min_statistics_step:
            return None
        states = [self._refresh_state(name) for name in self._averages]
        name = choose_next(states, self._policy, request.step, self._last_chosen)
        if name is None:
            return None
        self._last_chosen = name
        return self._invert(name, request.gammas)

    def _refresh_state(self, name: str) -> LayerRefreshState:
        layer = next(layer for layer in self._setup.layers if layer.name == name)
        return LayerRefreshState(
            name=name,
            version=self._versions.get(name),
            statistics_step=self._averages[name].step,
            drift=self._drift(name),
            cost=self._setup.cost_model.layer_seconds(layer),
        )

    def _drift(self, name: str) -> float:
        """Return the relative change of a layer's factors since they were last inverted."""
        step = self._averages[name].step
        if self._policy != "largest_drift" or name not in self._inverted_factors or step == 0:
            return 0.0
        if self._drifts.get(name, (0, 0.0))[0] != step:
            drift = _relative_change(self._inverted_factors[name], self._averages[name].pair(name))
            self._drifts[name] = (step, drift)
        return self._drifts[name][1]

    def _invert(self, name: str, gammas: tuple[float, ...]) -> InverseMessage:
        started = time.perf_counter()
        averages = self._averages[name]
        pair = averages.pair(name)
        inverted = [self._try_invert(pair, gamma) for gamma in gammas]
        self._versions[name] = averages.step
        if self._policy == "largest_drift":
            self._inverted_factors[name] = pair
        seconds = time.perf_counter() - started
        self._counts["inversions"] += 1
        self._inversion_seconds += seconds
        good = [one for one in inverted if one is not None]
        header = InverseHeader(
            layer=name,
            version_step=averages.step,
            gammas=gammas,
            pis=tuple(None if one is None else one.pi for one in inverted),
            rungs=tuple(rung for one in good for rung in one.rungs),
            inversion_seconds=seconds,
        )
        return InverseMessage(header, pack_pairs(one.inverse for one in good))

    def _try_invert(self, pair: KroneckerPair, gamma: float) -> InvertedPair | None:
        try:
            return invert_pair(pair, gamma, self._settings.pi_norm)
        except InversionFailedError:
            return None

    def snapshot(self) -> dict[str, Array]:
        """Return the averages of all layers as arrays named `layer:name`."""
        return {
            f"{name}:{key}": array
            for name, averages in self._averages.items()
            for key, array in to_arrays(averages.state_dict()).items()
        }

    def status(self, queue_depth: int) -> InverseStatus:
        """Return the worker's health, `queue_depth` being the messages in its mailbox."""
        request = self._request
        due = [
            name
            for name, averages in self._averages.items()
            if request is not None
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


def _relative_change(old: KroneckerPair, new: KroneckerPair) -> float:
    changes = []
    for before, after in ((old.A, new.A), (old.G, new.G)):
        size = float(torch.linalg.matrix_norm(before))
        change = float(torch.linalg.matrix_norm(after - before))
        relative = change / size if size > 0 else float("inf") if change > 0 else 0.0
        # Norms that overflow leave inf / inf.
        changes.append(float("inf") if math.isnan(relative) else relative)
    return max(changes)
