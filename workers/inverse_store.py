"""The inverses that the parameter server has been sent, and which of them a step may use.

Inverse workers hand theirs in at any time from another thread; the newest version of a layer
wins. The step waits here at the staleness bound and nowhere else.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kfac_dist.config import StalenessSpec
from kfac_dist.coordination.assignment import LayerCost
from kfac_dist.coordination.staleness import Admission, StalenessBound, admit
from kfac_dist.core.inverse import InvertedPair, redamp
from kfac_dist.errors import TimedOutError
from workers.messages import InverseHeader
from workers.transport import Array, pack_pairs, section, unpack_pairs


@dataclass(frozen=True, kw_only=True)
class HeldInverses:
    """The newest inverses of one layer; None by gamma where the inversion failed."""

    version_step: int
    by_gamma: Mapping[float, InvertedPair | None]

    def nearest(self, gamma: float) -> InvertedPair | None:
        """Return the inverse whose damping is nearest to `gamma`."""
        return self.by_gamma[min(self.by_gamma, key=lambda held: abs(held - gamma))]


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """What a step may use: the newest inverses of each layer that has any, and on what terms."""

    held: Mapping[str, HeldInverses]
    admission: Admission
    waited_seconds: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One inverse for each layer that has one, made with or near to `gamma`."""

    gamma: float
    inverses: Mapping[str, InvertedPair]


@dataclass
class InverseStore:
    """The newest inverses by layer.

    `patience_seconds` bounds the wait for an inverse worker that lives but does not answer.
    """

    layers: Sequence[LayerCost]
    bound: StalenessBound
    staleness: StalenessSpec
    patience_seconds: float
    _held: dict[str, HeldInverses] = field(default_factory=dict)
    _in_use: dict[str, InvertedPair] = field(default_factory=dict)
    _orphaned: frozenset[str] = frozenset()
    _failed_step: dict[str, int] = field(default_factory=dict)
    _newest_statistics: int = 0
    _counts: Counter[str] = field(default_factory=Counter)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def accept(self, header: InverseHeader, array: Array) -> None:
        """Take in the inverses of a layer, unless newer ones are here; may be called any time."""
        layer = next(layer for layer in self.layers if layer.name == header.layer)
        num_failed = header.pis.count(None)
        all_failed = num_failed == len(header.pis)
        held = None if all_failed else self._unpack(layer, header, array)
        with self._changed:
            self._counts.update(header.rungs)
            kept = header.layer in self._held
            self._counts["kept_inverse" if kept else "no_inverse"] += num_failed
            if held is None:
                self._failed_step[header.layer] = header.version_step
            else:
                self._failed_step.pop(header.layer, None)
                current = self._held.get(header.layer)
                if current is None or current.version_step <= held.version_step:
                    self._held[header.layer] = held
            self._changed.notify_all()

    @staticmethod
    def _unpack(layer: LayerCost, header: InverseHeader, array: Array) -> HeldInverses:
        num_good = sum(pi is not None for pi in header.pis)
        pieces = iter(array.reshape(num_good, -1))
        by_gamma: dict[float, InvertedPair | None] = {}
        for gamma, pi in zip(header.gammas, header.pis, strict=True):
            by_gamma[gamma] = None
            if pi is not None:
                by_gamma[gamma] = _inverted(next(pieces), layer, pi, gamma)
        return HeldInverses(version_step=header.version_step, by_gamma=by_gamma)

    def set_orphaned(self, layers: Collection[str]) -> None:
        """Tell which layers no inverse worker refreshes now; a waiting step decides anew."""
        with self._changed:
            self._orphaned = frozenset(layers)
            self._changed.notify_all()

    def note_statistics(self, step: int) -> None:
        """Tell that the statistics of `step` were sent by all gradient workers, and are usable."""
        self._newest_statistics = step

    def admit(self, step: int) -> Admitted:
        """Return what `step` may use, after waiting for what it may not do without.

        Raises:
            TimedOutError: an inverse did not come within `patience_seconds`.
        """
        started = time.perf_counter()
        with self._changed:
            admission = self._decide(step)
            while admission.wait_for:
                left = self.patience_seconds - (time.perf_counter() - started)
                if left <= 0 or not self._changed.wait(left):
                    raise TimedOutError(
                        f"no new inverse of {', '.join(admission.wait_for)} came within "
                        f"{self.patience_seconds:g} s at step {step}"
                    )
                admission = self._decide(step)
            return Admitted(
                held=dict(self._held),
                admission=admission,
                waited_seconds=time.perf_counter() - started,
            )

    def _decide(self, step: int) -> Admission:
        versions = {
            layer.name: held.version_step if (held := self._held.get(layer.name)) else None
            for layer in self.layers
        }
        return admit(
            step,
            versions,
            self.bound,
            self.staleness.at_bound,
            self._orphaned | self._failed(step),
            newest_statistics=self._newest_statistics,
        )

    def _failed(self, step: int) -> set[str]:
        """Return the layers whose last inversion failed and that no refresh is under way for.

        In a synchronous run the next scheduled refresh is waited for like any other.
        """
        if not self.bound.is_synchronous(step):
            return set(self._failed_step)
        oldest = self.bound.oldest_admissible(step)
        return {name for name, failed in self._failed_step.items() if failed >= oldest}

    def candidate(self, step: int, admitted: Admitted, gamma: float) -> Candidate:
        """Return the admitted inverses that are nearest to `gamma`.

        Where that inversion failed, the one used last is kept. A layer that is admitted only with
        heavier damping gets its gamma raised in proportion to its age over the bound.
        """
        inverses: dict[str, InvertedPair] = {}
        for name, held in admitted.held.items():
            inverse = held.nearest(gamma) or self._in_use.get(name)
            if inverse is None:
                continue
            if name in admitted.admission.damp:
                age = step - held.version_step
                inverse = redamp(inverse, inverse.gamma * age / self.staleness.max_steps)
            inverses[name] = inverse
        return Candidate(gamma=gamma, inverses=inverses)

    def use(self, candidate: Candidate) -> None:
        """Remember the inverses of an applied step."""
        self._in_use = dict(candidate.inverses)

    def counts(self) -> Counter[str]:
        """Return how often each rung of the ladder of numeric trouble was climbed, by name."""
        with self._changed:
            return Counter(self._counts)

    def snapshot(self, gamma: float) -> dict[str, Array]:
        """Return for each layer the inverse nearest to `gamma`, by flat names."""
        with self._changed:
            held = dict(self._held)
        state: dict[str, Array] = {}
        for name, one in held.items():
            inverse = one.nearest(gamma) or self._in_use.get(name)
            if inverse is not None:
                state[f"{name}:factors"] = pack_pairs([inverse.inverse])
                state[f"{name}:pi"] = np.array(inverse.pi)
                state[f"{name}:gamma"] = np.array(inverse.gamma)
                state[f"{name}:version_step"] = np.array(one.version_step)
        return state

    def restore(self, snapshot: Mapping[str, Array]) -> None:
        """Take over a snapshot."""
        for layer in self.layers:
            state = section(snapshot, f"{layer.name}:")
            if not state:
                continue
            gamma = float(state["gamma"])
            inverse = _inverted(state["factors"], layer, float(state["pi"]), gamma)
            self._held[layer.name] = HeldInverses(
                version_step=int(state["version_step"]), by_gamma={gamma: inverse}
            )
            self._in_use[layer.name] = inverse


def _inverted(array: Array, layer: LayerCost, pi: float, gamma: float) -> InvertedPair:
    pair = unpack_pairs(array, [layer])[layer.name]
    return InvertedPair(inverse=pair, pi=pi, gamma=gamma, rungs=())
