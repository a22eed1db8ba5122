"""The inverses that the parameter server has received, and which of them a step may use.

An inverse has one life here: it becomes *available* when it arrives, at any time and from another
thread; it is *admitted* when the staleness rule lets a step use it; it is *in use* once that step
has been applied. The newest version of a layer wins. A step waits for inverses here and nowhere
else (docs/algorithm.md#asynchrony).
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kfac_dist.config import StalenessSpec
from kfac_dist.coordination.steps.staleness import Admission, StalenessBound, admit
from kfac_dist.core.inverse.damped import Inverted
from kfac_dist.core.inverse.precondition import LayerInverse
from kfac_dist.core.inverse.shelf import (
    InverseShelf,
    InverseVersion,
    all_inverted_for,
    layer_inverses,
    nearest_inverses,
)
from kfac_dist.core.inverse.structure import Structure
from kfac_dist.core.vector import is_finite
from kfac_dist.errors import TimedOutError
from workers.exchange.arrays import Array, Arrays
from workers.exchange.messages import InverseHeader, InverseMessage
from workers.exchange.moments import Basis, Moments
from workers.exchange.parcels import pack_tensors, unpack_inverses, unpack_tensors

# Accepted statistics that are remembered, in steps: more than a step's versions can be behind it.
REMEMBERED_STATISTICS = 4096


@dataclass(frozen=True, kw_only=True)
class AdmittedInverses:
    """The inverses that the staleness rule lets one step use.

    Attributes:
        held: the admitted version of each layer that has one, with an inverse for every gamma it
            was made for.
        admission: which layers are used beyond the staleness bound, and how.
        by_gamma: for each gamma that the step tries, one inverse of each layer, made with this
            gamma or the nearest. Empty until `InverseStore.at_gammas` fills it.
    """

    step: int
    held: Mapping[str, InverseVersion]
    admission: Admission
    waited_seconds: float
    by_gamma: Mapping[float, Mapping[str, Inverted[Any]]] = field(default_factory=dict)

    @property
    def gammas(self) -> list[float]:
        """The gammas that the step tries."""
        return list(self.by_gamma)

    def candidates(self) -> list[dict[str, LayerInverse]]:
        """Return for each of `gammas` the inverses by layer, ready to be applied."""
        return [layer_inverses(inverted) for inverted in self.by_gamma.values()]

    def carry(self, gammas: Sequence[float]) -> bool:
        """Return whether every layer has an inverse for each of `gammas`.

        Layers beyond the staleness bound and layers without an inverse do not count, so that they
        do not hold up a search for gamma.
        """
        excused = {*self.admission.stale, *self.admission.gradient}
        counted = {name: held for name, held in self.held.items() if name not in excused}
        return all_inverted_for(counted, gammas)


@dataclass
class InverseStore:
    """The inverses of all `layers`, on `device`.

    `patience_seconds` bounds the wait for an inverse worker that is alive but does not answer.
    """

    layers: Sequence[str]
    structure: Structure[Any]
    bound: StalenessBound
    staleness: StalenessSpec
    patience_seconds: float
    device: torch.device
    _shelf: InverseShelf = field(init=False)
    _orphaned: frozenset[str] = frozenset()
    _failed_step: dict[str, int] = field(default_factory=dict)  # the version that was not made
    _accepted_statistics: deque[int] = field(
        default_factory=lambda: deque(maxlen=REMEMBERED_STATISTICS)
    )
    _counts: Counter[str] = field(default_factory=Counter)
    _accepted: list[InverseHeader] = field(default_factory=list)  # since the last report
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._shelf = InverseShelf(self.structure)

    def accept(self, message: InverseMessage) -> None:
        """Make a version of a layer's inverses available; may be called from any thread."""
        header = message.header
        # Unpacked before the lock is taken, so that a step does not wait for it.
        held = self._unpack(message) if message.parcel.own else None
        with self._changed:
            self._accepted.append(header)
            self._counts.update(header.rungs)
            kept = header.layer in self._shelf
            self._counts["kept_inverse" if kept else "no_inverse"] += header.pis.count(None)
            if held is None:
                self._failed_step[header.layer] = header.version_step
            else:
                self._failed_step.pop(header.layer, None)
                self._shelf.put(header.layer, held)
            self._changed.notify_all()

    def _unpack(self, message: InverseMessage) -> InverseVersion:
        header, tensors = message.header, unpack_inverses(message.parcel, self.device)
        by_gamma = {
            gamma: None if pi is None else self.structure.restore(next(tensors), pi, gamma)
            for gamma, pi in zip(header.gammas, header.pis, strict=True)
        }
        return InverseVersion(version_step=header.version_step, by_gamma=by_gamma)

    def set_orphaned(self, layers: Collection[str]) -> None:
        """Set the layers that no inverse worker refreshes now; a waiting step decides again."""
        with self._changed:
            self._orphaned = frozenset(layers)
            self._changed.notify_all()

    def lose_statistics(self, layers: Collection[str], step: int) -> None:
        """Note that nobody can make versions of these layers up to `step` any more."""
        with self._changed:
            for layer in set(layers).intersection(self.layers):
                self._failed_step[layer] = max(step, self._failed_step.get(layer, 0))
            self._changed.notify_all()

    def note_statistics(self, step: int) -> None:
        """Note that all gradient workers have sent usable statistics of `step`."""
        self._accepted_statistics.append(step)

    def is_ready(self, step: int) -> bool:
        """Return whether `step` can start without waiting for inverses or its own statistics."""
        with self._changed:
            return all(
                (version or 0) >= self.bound.oldest_admissible(step, name)
                for name, version in self._versions(step).items()
            )

    def admit(self, step: int) -> AdmittedInverses:
        """Return the inverses that `step` may use, after waiting for those it must have.

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
            return AdmittedInverses(
                step=step,
                held=self._shelf.admit(self.bound.only_admissible(step, self.layers)),
                admission=admission,
                waited_seconds=time.perf_counter() - started,
            )

    def _versions(self, step: int) -> dict[str, int | None]:
        """Return the version of each layer that is available to `step`, None without any."""
        only = self.bound.only_admissible(step, self.layers) or {}
        return {name: self._shelf.available_version(name, only.get(name)) for name in self.layers}

    def install(self, admitted: AdmittedInverses) -> AdmittedInverses:
        """Return the inverses as the step applies them.

        A new version takes over the moments of the version in use, and the inverse itself where
        the inversion failed. Nothing in the store changes before `use`, so if the step is not
        applied, the next one can do the same.
        """
        return replace(admitted, held=self._shelf.install(admitted.held))

    def _decide(self, step: int) -> Admission:
        return admit(
            step,
            self._versions(step),
            self.bound,
            self.staleness.at_bound,
            self._orphaned,
            failed=self._failed(step),
            accepted_statistics=self._accepted_statistics,
        )

    def _failed(self, step: int) -> set[str]:
        """Return the layers whose last inversion failed, so that `step` does not wait for them.

        A step that uses exact versions still waits for a refresh that came after the failed one.
        """
        return {
            name
            for name, failed in self._failed_step.items()
            if not self.bound.is_exact(step) or failed >= self.bound.oldest_admissible(step, name)
        }

    def at_gammas(self, admitted: AdmittedInverses, gammas: Sequence[float]) -> AdmittedInverses:
        """Return the admitted inverses with one set for each of `gammas` that the step tries."""
        return replace(admitted, by_gamma={g: self._at_gamma(admitted, g) for g in gammas})

    def _at_gamma(self, admitted: AdmittedInverses, gamma: float) -> dict[str, Inverted[Any]]:
        """Return the admitted inverses that are nearest to `gamma`.

        A layer that is admitted only with heavier damping gets its gamma raised in proportion to
        its age over the bound.
        """
        inverses = nearest_inverses(admitted.held, gamma)
        for name in [name for name in admitted.admission.damp if name in inverses]:
            age = admitted.step - admitted.held[name].version_step
            heavier = inverses[name].gamma * age / self.staleness.max_steps
            inverses[name] = self.structure.redamp(inverses[name], heavier)
        return inverses

    def use(self, admitted: AdmittedInverses, gamma: float, *, search_open: bool) -> None:
        """Put the inverses of an applied step in use.

        While a search for gamma is open those for all gammas are kept, else only the nearest to
        `gamma`.
        """
        self._shelf.use(admitted.held, gamma, search_open=search_open)

    def observe(self, moments: Mapping[str, Moments], num_cases: int) -> None:
        """Average one step's sums of moments into the inverses in use, if all are finite."""
        if not all(is_finite(layer.sums) for layer in moments.values()):
            self._counts["refused_moments"] += 1
            return
        for name, layer in moments.items():
            used = self._shelf.version_in_use(name)
            assert used == layer.version_step, "moments must be in the basis of the inverse in use"
        self._shelf.observe({name: layer.sums for name, layer in moments.items()}, num_cases)

    def bases(self) -> dict[str, Basis]:
        """Return the bases in which moments are to be computed."""
        return {
            name: Basis(version_step=self._shelf.version_in_use(name), pair=pair)
            for name, pair in self._shelf.bases().items()
        }

    def in_use(self) -> dict[str, InverseVersion]:
        """Return the versions in use, for `put_in_use`."""
        return self._shelf.versions_in_use()

    def put_in_use(self, versions: Mapping[str, InverseVersion]) -> None:
        """Go back to versions that were in use before a step that is repeated."""
        self._shelf.put_in_use(versions)

    def start_from(self, accepted_statistics: Sequence[int], other: InverseStore | None) -> None:
        """Begin with what is known of earlier steps, and the inverses that `other` has."""
        self._accepted_statistics.extend(accepted_statistics)
        if other is not None:
            with other._changed:
                self._shelf.adopt(other._shelf, self.layers)
                self._orphaned = other._orphaned

    def take_accepted(self) -> tuple[InverseHeader, ...]:
        """Return the headers of what has arrived since the last call, each once."""
        with self._changed:
            taken = tuple(self._accepted)
            self._accepted.clear()
            return taken

    def counts(self) -> Counter[str]:
        """Return how often each kind of numeric trouble occurred (docs/algorithm.md#ladder)."""
        with self._changed:
            return Counter(self._counts)

    def snapshot(self) -> dict[str, Array]:
        """Return all inverses that a later step may use, by flat names."""
        with self._changed:
            return dict(pack_tensors(self._shelf.state_dict()))

    def restore(self, snapshot: Arrays) -> None:
        """Restore a snapshot."""
        self._shelf.load_state_dict(unpack_tensors(snapshot, self.device))
