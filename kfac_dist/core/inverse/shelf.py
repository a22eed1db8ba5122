"""The inverses as their owner keeps them: versions that have come, and those in use.

The version of an inverse is the step of the newest statistics in it. A version is used from the
first step that takes it, however early it was made; what is observed meanwhile goes into the one in
use, and is carried over to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.inverse.damped import Inverted
from kfac_dist.core.inverse.precondition import LayerInverse
from kfac_dist.core.inverse.structure import Structure

InvertedLayers = dict[str, Inverted[Any]]


@dataclass(frozen=True, kw_only=True)
class HeldInverses:
    """One version of a layer's inverses, by the gamma it was made for; None where that failed."""

    version_step: int
    by_gamma: Mapping[float, Inverted[Any] | None]

    def nearest(self, gamma: float) -> Inverted[Any] | None:
        """Return the inverse whose damping is nearest to `gamma`."""
        return self.by_gamma[self._nearest_gamma(gamma)]

    def only(self, gamma: float) -> HeldInverses:
        """Return them without those for other gammas than the nearest."""
        nearest = self._nearest_gamma(gamma)
        return replace(self, by_gamma={nearest: self.by_gamma[nearest]})

    def _nearest_gamma(self, gamma: float) -> float:
        return min(self.by_gamma, key=lambda held: abs(held - gamma))

    def any_made(self) -> Inverted[Any] | None:
        """Return one that was made, whatever its gamma."""
        return next((one for one in self.by_gamma.values() if one is not None), None)


Held = dict[str, HeldInverses]


def at_gamma(held: Mapping[str, HeldInverses], gamma: float) -> InvertedLayers:
    """Return the inverse nearest to `gamma` of each layer that has one."""
    nearest = {name: one.nearest(gamma) for name, one in held.items()}
    return {name: inverted for name, inverted in nearest.items() if inverted is not None}


def ready(inverted: Mapping[str, Inverted[Any]]) -> dict[str, LayerInverse]:
    """Return the inverses themselves, to be applied."""
    return {name: one.inverse for name, one in inverted.items()}


def all_carry(held: Mapping[str, HeldInverses], gammas: Sequence[float]) -> bool:
    """Tell whether every layer has an inverse for each of `gammas`, or tried to."""
    return all(gamma in one.by_gamma for one in held.values() for gamma in gammas)


@dataclass
class InverseShelf:
    """All versions of the layers' inverses that a step may still take, and the versions in use."""

    structure: Structure[Any]
    _versions: dict[str, dict[int, HeldInverses]] = field(default_factory=dict)
    _used: Held = field(default_factory=dict)

    def put(self, name: str, new: HeldInverses) -> None:
        """Add a version, unless one as new is here."""
        versions = self._versions.setdefault(name, {})
        if not versions or new.version_step > max(versions):
            versions[new.version_step] = new

    def __contains__(self, name: str) -> bool:
        return name in self._versions

    def version(self, name: str, at_most: int | None = None) -> int | None:
        """Return the newest version of a layer, None without any.

        With `at_most` the newest that is no newer, or the oldest if all are.
        """
        versions = self._versions.get(name)
        if not versions:
            return None
        fitting = [version for version in versions if at_most is None or version <= at_most]
        return max(fitting) if fitting else min(versions)

    def take(self, at_most: Mapping[str, int] | None = None) -> Held:
        """Return the `version` of each layer that has one; older ones will not be asked for.

        Layers that are not in `at_most` are left where they are.
        """
        taken = {}
        for name, versions in self._versions.items():
            if at_most is not None and name not in at_most:
                continue
            version = self.version(name, at_most[name] if at_most else None)
            assert version is not None, "a layer on the shelf has a version"
            taken[name] = versions[version]
            self._versions[name] = {v: held for v, held in versions.items() if v >= version}
        return taken

    def installed(self, taken: Mapping[str, HeldInverses]) -> Held:
        """Return what a step uses: new versions with what they take over from those in use.

        Where an inversion failed that is the inverse used last.
        """
        return {name: self._installed(self._used.get(name), new) for name, new in taken.items()}

    def _installed(self, used: HeldInverses | None, new: HeldInverses) -> HeldInverses:
        if used is None or used.version_step == new.version_step:
            return used or new
        by_gamma = {}
        for gamma, inverted in new.by_gamma.items():
            current = used.nearest(gamma)
            if inverted is not None:
                current = self.structure.install(inverted, current)
            by_gamma[gamma] = current
        return replace(new, by_gamma=by_gamma)

    def use(self, held: Mapping[str, HeldInverses], gamma: float, *, search_open: bool) -> None:
        """Remember the inverses of an applied step; those of other gammas only for a search."""
        self._used = {name: one if search_open else one.only(gamma) for name, one in held.items()}

    def in_use(self) -> InvertedLayers:
        """Return an inverse in use of each layer that has one."""
        made = {name: one.any_made() for name, one in self._used.items()}
        return {name: inverted for name, inverted in made.items() if inverted is not None}

    def used_version(self, name: str) -> int:
        """Return the version in use of a layer that has one."""
        return self._used[name].version_step

    def bases(self) -> dict[str, KroneckerPair]:
        """Return the bases in which moments are to be computed."""
        return self.structure.bases(self.in_use())

    def observe(self, moments: Mapping[str, Tensor], num_cases: int) -> None:
        """Take one step's sums of moments, in `bases`, into the inverses in use."""
        for name, sums in moments.items():
            used = self._used[name]
            by_gamma = {
                gamma: inverted
                and self.structure.observe({name: inverted}, {name: sums}, num_cases)[name]
                for gamma, inverted in used.by_gamma.items()
            }
            self._used[name] = replace(used, by_gamma=by_gamma)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the versions in use and the newer ones, by flat names; not copied."""
        state: dict[str, Tensor] = {}
        for name, versions in self._versions.items():
            used = self._used.get(name)
            kept = list(versions.values())
            if used is not None:
                kept = [used, *(one for one in kept if one.version_step > used.version_step)]
                state[f"{name}/used"] = torch.tensor(used.version_step)
            for held in kept:
                state |= _held_state(f"{name}/{held.version_step}", held)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state; the tensors are kept."""
        self._versions, self._used = {}, {}
        for key in [key for key in state if key.endswith("/gamma")]:
            name, version, number, _ = key.rsplit("/", 3)
            self._restore(state, name, int(version), f"{name}/{version}/{number}/")
        for name, versions in self._versions.items():
            if f"{name}/used" in state:
                self._used[name] = versions[int(state[f"{name}/used"])]

    def _restore(self, state: Mapping[str, Tensor], name: str, version: int, prefix: str) -> None:
        tensors = {
            key.removeprefix(prefix): tensor
            for key, tensor in state.items()
            if key.startswith(prefix)
        }
        gamma, pi = float(tensors.pop("gamma")), tensors.pop("pi", None)
        versions = self._versions.setdefault(name, {})
        held = versions.setdefault(version, HeldInverses(version_step=version, by_gamma={}))
        inverted = None if pi is None else self.structure.restore(tensors, float(pi), gamma)
        versions[version] = replace(held, by_gamma={**held.by_gamma, gamma: inverted})


def _held_state(prefix: str, held: HeldInverses) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for number, (gamma, inverted) in enumerate(held.by_gamma.items()):
        state[f"{prefix}/{number}/gamma"] = torch.tensor(gamma, dtype=torch.float64)
        if inverted is not None:
            state[f"{prefix}/{number}/pi"] = torch.tensor(inverted.pi, dtype=torch.float64)
            for key, tensor in inverted.inverse.tensors().items():
                state[f"{prefix}/{number}/{key}"] = tensor
    return state
