"""The curvature of all layers in one process: averaged factors, and a shelf of inverses.

In a distributed run the inverse workers hold the averages and the parameter server the shelf;
both use the same `Structure`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kfac_dist.config import KFACSpec
from kfac_dist.core.blocks.registration import Registration
from kfac_dist.core.factors import FactorAverages
from kfac_dist.core.inverse.saved_shapes import check_shapes
from kfac_dist.core.inverse.shelf import InverseShelf, InverseVersion, layer_inverses
from kfac_dist.core.inverse.structure import structure_for
from kfac_dist.core.statistics.refusals import REFUSALS_TO_WARN_OF, refusal_warning
from kfac_dist.core.statistics.sums import BatchStatistics
from kfac_dist.errors import InvalidSpecError

_LOG = logging.getLogger(__name__)


class Curvature:
    """Averaged factors and inverses of the layers of a model.

    `events` counts the rungs of the ladder of numeric trouble (docs/algorithm.md#ladder). The first
    time that statistics are refused several times in a row, a warning is logged.
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
        self._blocks = registration.blocks
        self._events = events
        self._refused_in_a_row = 0
        self._warned = False

    def update(self, step: int, statistics: BatchStatistics, num_cases: int) -> None:
        """Average in the statistics of one step, or refuse them if a number is not finite."""
        if not statistics.is_finite():
            self._events["refused_statistics"] += 1
            self._note_refusal(step, statistics)
            return
        self._refused_in_a_row = 0
        self.averages.update(step, statistics.factors, num_cases, statistics.crosses)
        self.shelf.observe(statistics.moments, num_cases)

    def _note_refusal(self, step: int, statistics: BatchStatistics) -> None:
        self._refused_in_a_row += 1
        if self._refused_in_a_row == REFUSALS_TO_WARN_OF and not self._warned:
            self._warned = True
            _LOG.warning("%s", refusal_warning(step, statistics.not_finite()))

    def invert(self, gammas: Sequence[float]) -> None:
        """Invert the averaged factors at each gamma and make the inverses available.

        A layer whose inversion fails at every gamma keeps the inverses it has.
        """
        if self.averages.step == 0:
            return  # the statistics of every step so far were refused
        for name in self.averages.names:
            inverted = self.structure.invert_at_gammas(self.averages.snapshot(name), gammas)
            succeeded = [inverse for inverse in inverted if inverse is not None]
            self._events.update(rung for inverse in succeeded for rung in inverse.rungs)
            kept = "kept_inverse" if name in self.shelf else "no_inverse"
            self._events[kept] += inverted.count(None)
            if not succeeded:
                continue
            by_gamma = dict(zip(gammas, inverted, strict=True))
            version = InverseVersion(version_step=self.averages.step, by_gamma=by_gamma)
            self.shelf.put(name, version)

    def precondition(self, matrices: Mapping[str, Tensor], gamma: float) -> dict[str, Tensor]:
        """Return the direction of each layer [dim_G, dim_A] by the inverses in use."""
        inverses = layer_inverses(self.shelf.inverses_in_use())
        directions, _ = self.structure.precondition(matrices, inverses, gamma)
        return directions

    def state_dict(self) -> dict[str, Any]:
        """Return the structure, the averages and the shelf."""
        return {
            "inverse": self._inverse,
            "factors": self.averages.state_dict(),
            "inverses": {name: value.clone() for name, value in self.shelf.state_dict().items()},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Check that a state belongs to these layers, with these shapes, and this structure.

        Raises:
            InvalidSpecError: it does not.
        """
        missing = [
            key for key in ("step_count", "inverse", "factors", "inverses") if key not in state
        ]
        if missing:
            raise InvalidSpecError(
                f"this is not the state of a K-FAC optimizer: it lacks {', '.join(missing)}"
            )
        if state["inverse"] != self._inverse:
            raise InvalidSpecError(
                f"the state was saved with inverse: {state['inverse']}; this optimizer has "
                f"inverse: {self._inverse}"
            )
        names = {key.rpartition("/")[0] for key in state["factors"] if "/" in key}
        unknown = sorted(names - set(self.averages.names))
        if unknown:
            raise InvalidSpecError(
                f"the state is of another model: it has layers {', '.join(unknown)}, this one has "
                f"{', '.join(self.averages.names)}"
            )
        check_shapes(state, self._blocks, self.structure.links)

    def load_state_dict(self, state: Mapping[str, Any], like: Tensor) -> None:
        """Restore a copy of the state of the same layers and structure.

        Matrices get the type and the device of `like`, as parameters do that are loaded.
        """
        factors, inverses = (
            {key: _copy_like(value, like) for key, value in state[part].items()}
            for part in ("factors", "inverses")
        )
        self.averages.load_state_dict(factors)
        self.shelf.load_state_dict(inverses)


def _copy_like(value: Tensor, like: Tensor) -> Tensor:
    # Counters and gammas are numbers of their own types.
    return value.clone() if value.dim() == 0 else value.to(like, copy=True)
