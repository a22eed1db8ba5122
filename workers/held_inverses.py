"""Inverses at the parameter server: as they came, as a step may use them, as it tries them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kfac_dist.coordination.staleness import Admission
from kfac_dist.core.inverse import Inverted
from kfac_dist.core.precondition import LayerInverse


@dataclass(frozen=True, kw_only=True)
class HeldInverses:
    """The newest inverses of one layer; None by gamma where the inversion failed."""

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

    def in_use(self) -> Inverted[Any] | None:
        """Return one that was made, whatever its gamma."""
        return next((one for one in self.by_gamma.values() if one is not None), None)


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """What a step may use: the newest inverses of each layer that has any, and on what terms."""

    held: Mapping[str, HeldInverses]
    admission: Admission
    waited_seconds: float

    def carry(self, gammas: Sequence[float]) -> bool:
        """Tell whether every layer has an inverse for each of `gammas`, or an excuse."""
        excused = {*self.admission.stale, *self.admission.gradient}
        return all(
            gamma in held.by_gamma
            for name, held in self.held.items()
            for gamma in gammas
            if name not in excused
        )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One inverse for each layer that has one, made with or near to `gamma`."""

    gamma: float
    inverses: Mapping[str, Inverted[Any]]

    @property
    def by_layer(self) -> dict[str, LayerInverse]:
        """The inverses, ready to be applied."""
        return {name: inverted.inverse for name, inverted in self.inverses.items()}


@dataclass(frozen=True, kw_only=True)
class StepInverses:
    """What a step preconditions with: one candidate, or several to choose from."""

    admitted: Admitted
    candidates: Sequence[Candidate]

    @property
    def gammas(self) -> list[float]:
        """The gamma of each candidate."""
        return [candidate.gamma for candidate in self.candidates]
