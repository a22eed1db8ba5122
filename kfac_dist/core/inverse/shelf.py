"""The inverses of all layers, as one owner keeps them: some available, some in use.

The version of an inverse is the step of the newest statistics in it. Each version of a layer's
inverses lives through three states:

    available   `put` on the shelf, where it waits for a step
    admitted    `admit` hands it to a step, by the rule that the caller gives
    in use      `use` records it, once the step has been applied

Moments (EKFAC) that are observed while a newer version waits go into the version in use; `install`
carries them over to the newer one when a step first admits it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.inverse.damped import Inverted
from kfac_dist.core.inverse.precondition import LayerInverse
from kfac_dist.core.inverse.structure import Structure


@dataclass(frozen=True, kw_only=True)
class InverseVersion:
    """One version of a layer's inverses: one for each gamma, None where the inversion failed."""

    version_step: int
    by_gamma: Mapping[float, Inverted[Any] | None]

    def nearest(self, gamma: float) -> Inverted[Any] | None:
        """Return the inverse whose gamma is nearest to `gamma`."""
        return self.by_gamma[self._nearest_gamma(gamma)]

    def keep_nearest(self, gamma: float) -> InverseVersion:
        """Return a version with only the inverse nearest to `gamma`."""
        nearest = self._nearest_gamma(gamma)
        return replace(self, by_gamma={nearest: self.by_gamma[nearest]})

    def _nearest_gamma(self, gamma: float) -> float:
        return min(self.by_gamma, key=lambda available: abs(available - gamma))

    def any_inverse(self) -> Inverted[Any] | None:
        """Return the first inverse that did not fail, whatever its gamma."""
        return next((inverted for inverted in self.by_gamma.values() if inverted is not None), None)


def nearest_inverses(
    versions: Mapping[str, InverseVersion], gamma: float
) -> dict[str, Inverted[Any]]:
    """Return each layer's inverse nearest to `gamma`, leaving out layers where it failed."""
    nearest = {name: version.nearest(gamma) for name, version in versions.items()}
    return {name: inverted for name, inverted in nearest.items() if inverted is not None}


def layer_inverses(inverted: Mapping[str, Inverted[Any]]) -> dict[str, LayerInverse]:
    """Return what multiplies the gradients, without how it was damped."""
    return {name: layer.inverse for name, layer in inverted.items()}


def all_inverted_for(versions: Mapping[str, InverseVersion], gammas: Sequence[float]) -> bool:
    """Return whether every layer was inverted for each of `gammas`, successfully or not."""
    return all(gamma in version.by_gamma for version in versions.values() for gamma in gammas)


@dataclass
class InverseShelf:
    """The available inverses of all layers, by version, and the versions in use."""

    structure: Structure[Any]
    _available: dict[str, dict[int, InverseVersion]] = field(default_factory=dict)
    _in_use: dict[str, InverseVersion] = field(default_factory=dict)

    def put(self, name: str, new: InverseVersion) -> None:
        """Make a version available, unless one at least as new already is."""
        versions = self._available.setdefault(name, {})
        if not versions or new.version_step > max(versions):
            versions[new.version_step] = new

    def __contains__(self, name: str) -> bool:
        return name in self._available

    def available_version(self, name: str, at_most: int | None = None) -> int | None:
        """Return the newest available version of a layer, None if it has none.

        With `at_most`, the newest version up to that step, or the oldest if all are newer.
        """
        versions = self._available.get(name)
        if not versions:
            return None
        fitting = [version for version in versions if at_most is None or version <= at_most]
        return max(fitting) if fitting else min(versions)

    def admit(self, at_most: Mapping[str, int] | None = None) -> dict[str, InverseVersion]:
        """Return the inverses that a step may use, and forget the versions older than those.

        A layer's is the newest available version, or with `at_most` the newest up to the step
        given there. Layers that `at_most` does not name are left out.
        """
        admitted = {}
        for name, versions in self._available.items():
            if at_most is not None and name not in at_most:
                continue
            step = self.available_version(name, at_most[name] if at_most else None)
            assert step is not None, "a layer on the shelf has a version"
            admitted[name] = versions[step]
            self._available[name] = {s: version for s, version in versions.items() if s >= step}
        return admitted

    def install(self, admitted: Mapping[str, InverseVersion]) -> dict[str, InverseVersion]:
        """Return the admitted versions with what they take over from those in use.

        A new version takes over the moments, and where its inversion failed the inverse itself.
        The shelf does not change, so a step that is not applied has no effect on the next one.
        """
        return {name: self._install(self._in_use.get(name), new) for name, new in admitted.items()}

    def _install(self, current: InverseVersion | None, new: InverseVersion) -> InverseVersion:
        if current is None:
            return new
        if current.version_step == new.version_step:
            return current  # it has the moments observed since it was installed
        by_gamma = {}
        for gamma, inverted in new.by_gamma.items():
            old = current.nearest(gamma)
            by_gamma[gamma] = old if inverted is None else self.structure.install(inverted, old)
        return replace(new, by_gamma=by_gamma)

    def use(
        self, installed: Mapping[str, InverseVersion], gamma: float, *, search_open: bool
    ) -> None:
        """Record the inverses that an applied step used.

        Inverses for gammas other than `gamma` are kept only while a search for gamma is open.
        """
        self._in_use = {
            name: version if search_open else version.keep_nearest(gamma)
            for name, version in installed.items()
        }

    def versions_in_use(self) -> dict[str, InverseVersion]:
        """Return the versions in use, for `put_in_use`."""
        return dict(self._in_use)

    def put_in_use(self, versions: Mapping[str, InverseVersion]) -> None:
        """Go back to versions that were in use before."""
        self._in_use = dict(versions)

    def adopt(self, other: InverseShelf, names: Collection[str]) -> None:
        """Take over the inverses of `names` from another shelf; nothing is copied."""
        for name in names:
            if name in other._available:
                self._available[name] = other._available[name]
            if name in other._in_use:
                self._in_use[name] = other._in_use[name]

    def inverses_in_use(self) -> dict[str, Inverted[Any]]:
        """Return an inverse in use of each layer that has one."""
        found = {name: version.any_inverse() for name, version in self._in_use.items()}
        return {name: inverted for name, inverted in found.items() if inverted is not None}

    def version_in_use(self, name: str) -> int:
        """Return the version in use of a layer that has one."""
        return self._in_use[name].version_step

    def bases(self) -> dict[str, KroneckerPair]:
        """Return the eigenbases in which moments are computed, by layer."""
        return self.structure.bases(self.inverses_in_use())

    def observe(self, moments: Mapping[str, Tensor], num_cases: int) -> None:
        """Average one step's sums of moments, in `bases`, into the inverses in use."""
        for name, sums in moments.items():
            version = self._in_use[name]
            by_gamma = {
                gamma: inverted
                and self.structure.observe({name: inverted}, {name: sums}, num_cases)[name]
                for gamma, inverted in version.by_gamma.items()
            }
            self._in_use[name] = replace(version, by_gamma=by_gamma)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the versions in use and the newer ones, by flat names; not copied."""
        state: dict[str, Tensor] = {}
        for name, versions in self._available.items():
            current = self._in_use.get(name)
            kept = list(versions.values())
            if current is not None:
                newer = (v for v in versions.values() if v.version_step > current.version_step)
                kept = [current, *newer]
                state[f"{name}/used"] = torch.tensor(current.version_step)
            for version in kept:
                state |= _version_state(f"{name}/{version.version_step}", version)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the versions from `state`; its tensors are kept, not copied."""
        self._available, self._in_use = {}, {}
        for key in [key for key in state if key.endswith("/gamma")]:
            name, step, number, _ = key.rsplit("/", 3)
            self._restore(state, name, int(step), f"{name}/{step}/{number}/")
        for name, versions in self._available.items():
            if f"{name}/used" in state:
                self._in_use[name] = versions[int(state[f"{name}/used"])]

    def _restore(self, state: Mapping[str, Tensor], name: str, step: int, prefix: str) -> None:
        """Add one inverse, whose tensors have `prefix`, to the version of `step`."""
        tensors = {
            key.removeprefix(prefix): tensor
            for key, tensor in state.items()
            if key.startswith(prefix)
        }
        gamma, pi = float(tensors.pop("gamma")), tensors.pop("pi", None)
        versions = self._available.setdefault(name, {})
        version = versions.setdefault(step, InverseVersion(version_step=step, by_gamma={}))
        # A failed inversion was saved as its gamma alone.
        inverted = None if pi is None else self.structure.restore(tensors, float(pi), gamma)
        versions[step] = replace(version, by_gamma={**version.by_gamma, gamma: inverted})


def _version_state(prefix: str, version: InverseVersion) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for number, (gamma, inverted) in enumerate(version.by_gamma.items()):
        state[f"{prefix}/{number}/gamma"] = torch.tensor(gamma, dtype=torch.float64)
        if inverted is not None:
            state[f"{prefix}/{number}/pi"] = torch.tensor(inverted.pi, dtype=torch.float64)
            for key, tensor in inverted.inverse.tensors().items():
                state[f"{prefix}/{number}/{key}"] = tensor
    return state
