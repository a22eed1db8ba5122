"""What the parameter server owns for every optimizer: parameters, their version and average."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_dist.config import AveragingSpec
from kfac_dist.core.step.averaging import ParameterAverage
from kfac_dist.core.vector import is_finite
from workers.exchange.arrays import (
    Array,
    Arrays,
    section,
    to_array,
    to_arrays,
    to_tensor,
    to_tensors,
)
from workers.exchange.step import BatchSums


class MeanGradient(NamedTuple):
    """Means over a batch: `loss` in nats a case, `objective` and `gradient` [P] with l2 terms."""

    loss: float
    objective: float
    gradient: Tensor

    def is_finite(self) -> bool:
        """Return whether loss and gradient are finite; if not, the step is skipped."""
        return math.isfinite(self.loss) and is_finite(self.gradient)


class ServerState:
    """The parameter vector [P], its version and its Polyak average.

    `version` grows by one with each applied update.
    """

    def __init__(self, parameters: Tensor, l2: float, averaging: AveragingSpec | None) -> None:
        self.parameters = parameters
        self.version = 0
        self._l2 = l2
        self._average = ParameterAverage(averaging.decay, averaging.start) if averaging else None

    def l2_term(self) -> float:
        """Return (l2 / 2) ||theta||^2."""
        return 0.5 * self._l2 * float(torch.dot(self.parameters, self.parameters))

    def mean(self, sums: BatchSums) -> MeanGradient:
        """Return the means over a batch; the gradient is computed in the memory of the sum."""
        loss = sums.loss / sums.num_cases
        objective = loss + self.l2_term()
        gradient = sums.gradient.div_(sums.num_cases).add_(self.parameters, alpha=self._l2)
        return MeanGradient(loss, objective, gradient)

    def applied(self, step: int) -> None:
        """Count an update that has just been made to `parameters`, and average them."""
        self.version += 1
        if self._average is not None:
            self._average.update(step, self.parameters)

    def averaged(self) -> Array | None:
        """Return a copy of the averaged parameters [P], None before there is an average."""
        value = None if self._average is None else self._average.value
        return None if value is None else to_array(value).copy()

    def snapshot(self) -> dict[str, Array]:
        """Return a copy of everything, by flat names."""
        state = {"parameters": self.parameters.clone(), "version": torch.tensor(self.version)}
        if self._average is not None:
            for name, value in self._average.state_dict().items():
                state[f"average:{name}"] = value
        return to_arrays(state)

    def restore(self, snapshot: Arrays) -> None:
        """Restore a snapshot."""
        self.parameters.copy_(to_tensor(snapshot["parameters"]))
        self.version = int(snapshot["version"])
        average = to_tensors(section(snapshot, "average:"), self.parameters.device)
        if self._average is not None and average:
            self._average.load_state_dict(average)
