"""The inverses that the parameter server has been sent, and which of them a step may use.

Inverse workers hand theirs in at any time from another thread; the newest version of a layer
wins. The step waits here at the staleness bound and nowhere else. What the last applied step used
belongs to the server's own thread: moments are taken into it, and a newer version is installed
when a step first uses it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from kfac_dist.config import StalenessSpec
from kfac_dist.coordination.staleness import Admission, StalenessBound, admit
from kfac_dist.core.inverse import Inverted
from kfac_dist.core.structure import Structure
from kfac_dist.errors import TimedOutError
from workers.held_inverses import Admitted, Candidate, HeldInverses
from workers.messages import InverseHeader
from workers.moments_exchange import Basis, Moments
from workers.parcels import InverseParcel, pack_tensors, unpack_inverses, unpack_tensors
from workers.transport import Array, section


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
    _held: dict[str, HeldInverses] = field(default_factory=dict)
    _used: dict[str, HeldInverses] = field(default_factory=dict)
    _orphaned: frozenset[str] = frozenset()
    _failed_step: dict[str, int] = field(default_factory=dict)
    _newest_statistics: int = 0
    _counts: Counter[str] = field(default_factory=Counter)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def accept(self, header: InverseHeader, parcel: InverseParcel) -> None:
        """Take in the inverses of a layer, unless newer ones are here; may be called any time."""
        held = self._unpack(header, parcel) if parcel.own else None
        with self._changed:
            self._counts.update(header.rungs)
            if held is None:
                self._failed_step[header.layer] = header.version_step
                kept = header.layer in self._held
                self._counts["kept_inverse" if kept else "no_inverse"] += 1
            else:
                self._failed_step.pop(header.layer, None)
                current = self._held.get(header.layer)
                if current is None or current.version_step < held.version_step:
                    self._held[header.layer] = held
            self._changed.notify_all()

    def _unpack(self, header: InverseHeader, parcel: InverseParcel) -> HeldInverses:
        tensors = unpack_inverses(parcel, self.device)
        by_gamma = {
            gamma: None if pi is None else self.structure.restore(next(tensors), pi, gamma)
            for gamma, pi in zip(header.gammas, header.pis, strict=True)
        }
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

    def install(self, admitted: Admitted) -> Admitted:
        """Return them as a step uses them: newer ones with what they take over from those in use.

        Nothing is changed before `use`, so a step that is not applied leaves the next one to do it.
        """
        held = {name: self._installed(name, one) for name, one in admitted.held.items()}
        return replace(admitted, held=held)

    def _installed(self, name: str, new: HeldInverses) -> HeldInverses:
        """Return the inverses in use, or `new` if that is newer.

        Where the inversion failed, the inverse used last is kept.
        """
        used = self._used.get(name)
        if used is None or used.version_step == new.version_step:
            return used or new
        by_gamma = {}
        for gamma, inverted in new.by_gamma.items():
            current = used.nearest(gamma)
            if inverted is not None:
                current = self.structure.install(inverted, current)
            by_gamma[gamma] = current
        return replace(new, by_gamma=by_gamma)

    def _decide(self, step: int) -> Admission:
        versions = {
            name: held.version_step if (held := self._held.get(name)) else None
            for name in self.layers
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

        Where exact versions are used the next scheduled refresh is waited for like any other.
        """
        if not self.bound.is_exact(step):
            return set(self._failed_step)
        return {
            name
            for name, failed in self._failed_step.items()
            if failed >= self.bound.oldest_admissible(step, name)
        }

    def candidate(self, step: int, admitted: Admitted, gamma: float) -> Candidate:
        """Return the admitted inverses that are nearest to `gamma`.

        A layer that is admitted only with heavier damping gets its gamma raised in proportion to
        its age over the bound.
        """
        inverses: dict[str, Inverted[Any]] = {}
        for name, held in admitted.held.items():
            inverse = held.nearest(gamma)
            if inverse is None:
                continue
            if name in admitted.admission.damp:
                age = step - held.version_step
                heavier = inverse.gamma * age / self.staleness.max_steps
                inverse = self.structure.redamp(inverse, heavier)
            inverses[name] = inverse
        return Candidate(gamma=gamma, inverses=inverses)

    def use(self, admitted: Admitted, gamma: float, *, search_open: bool) -> None:
        """Remember the inverses of an applied step; those of other gammas only for a search."""
        self._used = {
            name: held if search_open else held.only(gamma) for name, held in admitted.held.items()
        }

    def observe(self, moments: Mapping[str, Moments], num_cases: int) -> None:
        """Take one step's sums of moments into the inverses in use, if all are finite."""
        if not all(bool(torch.isfinite(of.sums).all()) for of in moments.values()):
            self._counts["refused_moments"] += 1
            return
        for name, of in moments.items():
            used = self._used[name]
            assert used.version_step == of.version_step, "moments in the basis of the inverse"
            by_gamma = {
                gamma: inverted
                and self.structure.observe({name: inverted}, {name: of.sums}, num_cases)[name]
                for gamma, inverted in used.by_gamma.items()
            }
            self._used[name] = replace(used, by_gamma=by_gamma)

    def bases(self) -> dict[str, Basis]:
        """Return the bases in which moments are to be computed."""
        in_use = {
            name: inverted
            for name, used in self._used.items()
            if (inverted := used.in_use()) is not None
        }
        return {
            name: Basis(version_step=self._used[name].version_step, pair=pair)
            for name, pair in self.structure.bases(in_use).items()
        }

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
            inverted = self._installed(name, one).nearest(gamma)
            if inverted is not None:
                arrays = pack_tensors(inverted.inverse.tensors())
                state |= {f"{name}:tensor:{key}": array for key, array in arrays.items()}
                state[f"{name}:pi"] = np.array(inverted.pi)
                state[f"{name}:gamma"] = np.array(inverted.gamma)
                state[f"{name}:version_step"] = np.array(one.version_step)
        return state

    def restore(self, snapshot: Mapping[str, Array]) -> None:
        """Take over a snapshot."""
        for name in self.layers:
            state = section(snapshot, f"{name}:")
            if not state:
                continue
            gamma = float(state["gamma"])
            tensors = unpack_tensors(section(state, "tensor:"), self.device)
            inverted = self.structure.restore(tensors, float(state["pi"]), gamma)
            self._held[name] = self._used[name] = HeldInverses(
                version_step=int(state["version_step"]), by_gamma={gamma: inverted}
            )
