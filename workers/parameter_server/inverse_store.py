"""The inverses that the parameter server has been sent, and which of them a step may use.

Inverse workers hand theirs in at any time from another thread; the newest version of a layer
wins. The step waits here at the staleness bound and nowhere else.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
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
from workers.exchange.arrays import Array
from workers.exchange.messages import InverseHeader
from workers.exchange.moments import Basis, Moments
from workers.exchange.parcels import InverseParcel, pack_tensors, unpack_inverses, unpack_tensors


@dataclass
class InverseStore:
    """The newest inverses by layer, on `device`.

    `patience_seconds` bounds the wait for an inverse worker that lives but does not answer.
    """

    layers: Sequence[str]
    structure: Structure[Any]
    bound: StalenessBound
    staleness: StalenessSpec
    patience_seconds: float
    device: torch.device
    _shelf: InverseShelf = field(init=False)
    _orphaned: frozenset[str] = frozenset()
    _failed_step: dict[str, int] = field(default_factory=dict)
    _newest_statistics: int = 0
    _counts: Counter[str] = field(default_factory=Counter)
    _accepted: list[InverseHeader] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._shelf = InverseShelf(self.structure)

    def accept(self, header: InverseHeader, parcel: InverseParcel) -> None:
        """Take in a version of a layer's inverses; may be called any time."""
        held = self._unpack(header, parcel) if parcel.own else None
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

    def _unpack(self, header: InverseHeader, parcel: InverseParcel) -> InverseVersion:
        tensors = unpack_inverses(parcel, self.device)
        by_gamma = {
            gamma: None if pi is None else self.structure.restore(next(tensors), pi, gamma)
            for gamma, pi in zip(header.gammas, header.pis, strict=True)
        }
        return InverseVersion(version_step=header.version_step, by_gamma=by_gamma)

    def set_orphaned(self, layers: Collection[str]) -> None:
        """Tell which layers no inverse worker refreshes now; a waiting step decides anew."""
        with self._changed:
            self._orphaned = frozenset(layers)
            self._changed.notify_all()

    def note_statistics(self, step: int) -> None:
        """Tell that the statistics of `step` were sent by all gradient workers, and are usable."""
        self._newest_statistics = step

    def is_ready(self, step: int) -> bool:
        """Tell whether `step` may use what is here, whatever becomes of its own statistics."""
        with self._changed:
            return all(
                (version or 0) >= self.bound.oldest_admissible(step, name)
                for name, version in self._versions(step).items()
            )

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
                held=self._shelf.admit(self.bound.only_admissible(step, self.layers)),
                admission=admission,
                waited_seconds=time.perf_counter() - started,
            )

    def _versions(self, step: int) -> dict[str, int | None]:
        """Return the version of each layer that is here for `step`, None without any."""
        only = self.bound.only_admissible(step, self.layers) or {}
        return {name: self._shelf.available_version(name, only.get(name)) for name in self.layers}

    def install(self, admitted: Admitted) -> Admitted:
        """Return them as a step uses them: newer ones with what they take over from those in use.

        Nothing is changed before `use`, so a step that is not applied leaves the next one to do it.
        """
        return replace(admitted, held=self._shelf.install(admitted.held))

    def _decide(self, step: int) -> Admission:
        return admit(
            step,
            self._versions(step),
            self.bound,
            self.staleness.at_bound,
            self._orphaned | self._failed(step),
            newest_statistics=self._newest_statistics,
        )

    def _failed(self, step: int) -> set[str]:
        """Return the layers whose last inversion failed and that no refresh is under way for.

        Where exact versions are used the next scheduled refresh is waited for like any other.
        """
        return {
            name
            for name, failed in self._failed_step.items()
            if not self.bound.is_exact(step) or failed >= self.bound.oldest_admissible(step, name)
        }

    def candidate(self, step: int, admitted: Admitted, gamma: float) -> Candidate:
        """Return the admitted inverses that are nearest to `gamma`.

        A layer that is admitted only with heavier damping gets its gamma raised in proportion to
        its age over the bound.
        """
        inverses = nearest_inverses(admitted.held, gamma)
        for name in [name for name in admitted.admission.damp if name in inverses]:
            age = step - admitted.held[name].version_step
            heavier = inverses[name].gamma * age / self.staleness.max_steps
            inverses[name] = self.structure.redamp(inverses[name], heavier)
        return Candidate(gamma=gamma, inverses=inverses)

    def use(self, admitted: Admitted, gamma: float, *, search_open: bool) -> None:
        """Remember the inverses of an applied step; those of other gammas only for a search."""
        self._shelf.use(admitted.held, gamma, search_open=search_open)

    def observe(self, moments: Mapping[str, Moments], num_cases: int) -> None:
        """Take one step's sums of moments into the inverses in use, if all are finite."""
        if not all(is_finite(of.sums) for of in moments.values()):
            self._counts["refused_moments"] += 1
            return
        for name, of in moments.items():
            used = self._shelf.version_in_use(name)
            assert used == of.version_step, "moments in the basis of the inverse"
        self._shelf.observe({name: of.sums for name, of in moments.items()}, num_cases)

    def bases(self) -> dict[str, Basis]:
        """Return the bases in which moments are to be computed."""
        return {
            name: Basis(version_step=self._shelf.version_in_use(name), pair=pair)
            for name, pair in self._shelf.bases().items()
        }

    def take_accepted(self) -> tuple[InverseHeader, ...]:
        """Return what has come in since the last call, each once."""
        with self._changed:
            taken = tuple(self._accepted)
            self._accepted.clear()
            return taken

    def counts(self) -> Counter[str]:
        """Return how often each rung of the ladder of numeric trouble was climbed, by name."""
        with self._changed:
            return Counter(self._counts)

    def snapshot(self) -> dict[str, Array]:
        """Return all inverses that a later step may use, by flat names."""
        with self._changed:
            return dict(pack_tensors(self._shelf.state_dict()))

    def restore(self, snapshot: Mapping[str, Array]) -> None:
        """Take over a snapshot."""
        self._shelf.load_state_dict(unpack_tensors(snapshot, self.device))


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """What a step may use: the newest inverses of each layer that has any, and on what terms."""

    held: Mapping[str, InverseVersion]
    admission: Admission
    waited_seconds: float

    def carry(self, gammas: Sequence[float]) -> bool:
        """Tell whether every layer has an inverse for each of `gammas`, or an excuse."""
        excused = {*self.admission.stale, *self.admission.gradient}
        counted = {name: one for name, one in self.held.items() if name not in excused}
        return all_inverted_for(counted, gammas)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One inverse for each layer that has one, made with or near to `gamma`."""

    gamma: float
    inverses: Mapping[str, Inverted[Any]]

    @property
    def by_layer(self) -> dict[str, LayerInverse]:
        """The inverses, ready to be applied."""
        return layer_inverses(self.inverses)


@dataclass(frozen=True, kw_only=True)
class StepInverses:
    """What a step preconditions with: one candidate, or several to choose from."""

    admitted: Admitted
    candidates: Sequence[Candidate]

    @property
    def gammas(self) -> list[float]:
        """The gamma of each candidate."""
        return [candidate.gamma for candidate in self.candidates]
