"""Inverses at the parameter server: as a step may use them, as it tries them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfac_dist.coordination.steps.staleness import Admission
from kfac_dist.core.inverse.damped import Inverted
from kfac_dist.core.inverse.precondition import LayerInverse
from kfac_dist.core.inverse.shelf import Held, all_carry, ready


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """What a step may use: the newest inverses of each layer that has any, and on what terms."""

    held: Held
    admission: Admission
    waited_seconds: float

    def carry(self, gammas: Sequence[float]) -> bool:
        """Tell whether every layer has an inverse for each of `gammas`, or an excuse."""
        excused = {*self.admission.stale, *self.admission.gradient}
        counted = {name: one for name, one in self.held.items() if name not in excused}
        return all_carry(counted, gammas)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One inverse for each layer that has one, made with or near to `gamma`."""

    gamma: float
    inverses: Mapping[str, Inverted[Any]]

    @property
    def by_layer(self) -> dict[str, LayerInverse]:
        """The inverses, ready to be applied."""
        return ready(self.inverses)


@dataclass(frozen=True, kw_only=True)
class StepInverses:
    """What a step preconditions with: one candidate, or several to choose from."""

    admitted: Admitted
    candidates: Sequence[Candidate]

    @property
    def gammas(self) -> list[float]:
        """The gamma of each candidate."""
        return [candidate.gamma for candidate in self.candidates]
