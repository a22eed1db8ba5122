"""The curvature of all layers where one process holds it: averages, inverses in use, candidates.

In a distributed run the averages are the inverse workers' and the inverses the parameter
server's; both use the same `Structure`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kfac_dist.config import KFACSpec
from kfac_dist.core.factors import FactorAverages
from kfac_dist.core.inverse import Inverted
from kfac_dist.core.registration import Registration
from kfac_dist.core.statistics import BatchStatistics
from kfac_dist.core.structure import structure_for
from kfac_dist.errors import InvalidSpecError

InvertedLayers = dict[str, Inverted[Any]]


class Curvature:
    """Averaged factors and inverses of the layers of a model.

    `inverses` are those in use; `events` counts rungs of the ladder of numeric trouble.
    """

    def __init__(
        self, settings: KFACSpec, registration: Registration, events: Counter[str]
    ) -> None:
        names = registration.names
        self.structure = structure_for(settings, names, registration.links)
        self.averages = FactorAverages(names, settings.factor_decay, self.structure.links)
        self.inverses: InvertedLayers = {}
        self._settings = settings
        self._events = events

    def update(self, step: int, statistics: BatchStatistics, num_cases: int) -> None:
        """Take in the statistics of one step, unless a number is not finite."""
        if not statistics.is_finite():
            self._events["refused_statistics"] += 1
            return
        self.averages.update(step, statistics.factors, num_cases, statistics.crosses)
        self.inverses = self.structure.observe(self.inverses, statistics.moments, num_cases)

    def candidates(self, gammas: Sequence[float]) -> dict[float, InvertedLayers]:
        """Return new inverses of all layers by gamma; a layer keeps its current one on failure."""
        candidates = {gamma: dict(self.inverses) for gamma in gammas}
        for name in self.averages.names:
            prepared = self.structure.prepare(self.averages.snapshot(name), gammas)
            for inverted, by_layer in zip(prepared, candidates.values(), strict=True):
                self._install(name, inverted, by_layer)
        return candidates

    def _install(self, name: str, new: Inverted[Any] | None, by_layer: InvertedLayers) -> None:
        if new is None:
            self._events["kept_inverse" if name in by_layer else "no_inverse"] += 1
            return
        by_layer[name] = self.structure.install(new, by_layer.get(name))
        self._events.update(new.rungs)

    def solve(self, matrices: Mapping[str, Tensor], gamma: float) -> dict[str, Tensor]:
        """Return the direction of each layer [dim_G, dim_A] by the inverses in use."""
        inverses = {name: inverted.inverse for name, inverted in self.inverses.items()}
        return self.structure.solve(matrices, inverses, gamma)[0]

    def state_dict(self) -> dict[str, Any]:
        """Return structure, averages and, by layer, tensors, pi and gamma of the inverse in use."""
        return {
            "inverse": self._settings.inverse,
            "factors": self.averages.state_dict(),
            "inverses": {
                name: {**inverted.inverse.tensors(), "pi": inverted.pi, "gamma": inverted.gamma}
                for name, inverted in self.inverses.items()
            },
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Check that a state is of these layers and this structure.

        Raises:
            InvalidSpecError: it is not.
        """
        if state["inverse"] != self._settings.inverse:
            raise InvalidSpecError(
                f"the state is of inverse: {state['inverse']}; this optimizer has "
                f"inverse: {self._settings.inverse}"
            )
        unknown = sorted(set(state["inverses"]) - set(self.averages.names))
        if unknown:
            raise InvalidSpecError(
                f"the state is of another model: it has layers {', '.join(unknown)}, this one has "
                f"{', '.join(self.averages.names)}"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same layers and structure."""
        self.averages.load_state_dict(state["factors"])
        self.inverses = {
            name: self._restored(dict(saved)) for name, saved in state["inverses"].items()
        }

    def _restored(self, saved: dict[str, Any]) -> Inverted[Any]:
        pi, gamma = saved.pop("pi"), saved.pop("gamma")
        tensors = {name: tensor.clone() for name, tensor in saved.items()}
        return self.structure.restore(tensors, pi, gamma)
