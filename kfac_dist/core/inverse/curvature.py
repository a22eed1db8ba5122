"""The curvature of all layers where one process holds it: averages, and a shelf of inverses.

In a distributed run the averages are the inverse workers' and the shelf the parameter server's;
both use the same `Structure`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kfac_dist.config import KFACSpec
from kfac_dist.core.blocks.registration import Registration
from kfac_dist.core.factors import FactorAverages
from kfac_dist.core.inverse.shelf import InverseShelf, InverseVersion, layer_inverses
from kfac_dist.core.inverse.structure import structure_for
from kfac_dist.core.statistics.sums import BatchStatistics
from kfac_dist.errors import InvalidSpecError


class Curvature:
    """Averaged factors and inverses of the layers of a model.

    `events` counts rungs of the ladder of numeric trouble.
    """

    def __init__(
        self, settings: KFACSpec, registration: Registration, events: Counter[str]
    ) -> None:
        self.structure = structure_for(settings, registration.names, registration.links)
        self.averages = FactorAverages(
            registration.names, settings.factor_decay, self.structure.links
        )
        self.shelf = InverseShelf(self.structure)
        self._inverse = settings.inverse
        self._events = events

    def update(self, step: int, statistics: BatchStatistics, num_cases: int) -> None:
        """Take in the statistics of one step, unless a number is not finite."""
        if not statistics.is_finite():
            self._events["refused_statistics"] += 1
            return
        self.averages.update(step, statistics.factors, num_cases, statistics.crosses)
        self.shelf.observe(statistics.moments, num_cases)

    def prepare(self, gammas: Sequence[float]) -> None:
        """Put inverses for each gamma on the shelf; without any, a layer keeps what it has."""
        if self.averages.step == 0:
            return
        for name in self.averages.names:
            prepared = self.structure.prepare(self.averages.snapshot(name), gammas)
            made = [one for one in prepared if one is not None]
            self._events.update(rung for one in made for rung in one.rungs)
            kept = "kept_inverse" if name in self.shelf else "no_inverse"
            self._events[kept] += prepared.count(None)
            if not made:
                continue
            by_gamma = dict(zip(gammas, prepared, strict=True))
            version = InverseVersion(version_step=self.averages.step, by_gamma=by_gamma)
            self.shelf.put(name, version)

    def solve(self, matrices: Mapping[str, Tensor], gamma: float) -> dict[str, Tensor]:
        """Return the direction of each layer [dim_G, dim_A] by the inverses in use."""
        inverses = layer_inverses(self.shelf.inverses_in_use())
        return self.structure.solve(matrices, inverses, gamma)[0]

    def state_dict(self) -> dict[str, Any]:
        """Return the structure, the averages and the shelf."""
        return {
            "inverse": self._inverse,
            "factors": self.averages.state_dict(),
            "inverses": {name: value.clone() for name, value in self.shelf.state_dict().items()},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Check that a state is of these layers and this structure.

        Raises:
            InvalidSpecError: it is not.
        """
        if state["inverse"] != self._inverse:
            raise InvalidSpecError(
                f"the state is of inverse: {state['inverse']}; this optimizer has "
                f"inverse: {self._inverse}"
            )
        names = {key.rpartition("/")[0] for key in state["factors"] if "/" in key}
        unknown = sorted(names - set(self.averages.names))
        if unknown:
            raise InvalidSpecError(
                f"the state is of another model: it has layers {', '.join(unknown)}, this one has "
                f"{', '.join(self.averages.names)}"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same layers and structure."""
        self.averages.load_state_dict(state["factors"])
        self.shelf.load_state_dict(
            {name: value.clone() for name, value in state["inverses"].items()}
        )
