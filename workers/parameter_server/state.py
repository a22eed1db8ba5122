"""What a shard owns for every optimizer: its parameters, their version and average."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_dist.config import AveragingSpec
from kfac_dist.core.blocks.layout import BlockLayout
from kfac_dist.core.step.averaging import ParameterAverage
from kfac_dist.core.step.block_numbers import block_squares
from workers.exchange.arrays import (
    Array,
    Arrays,
    section,
    to_array,
    to_arrays,
    to_tensor,
    to_tensors,
)


class ShardState:
    """A shard's slice [Q] of the parameter vector, its version and its Polyak average.

    `version` grows by one with each applied update.
    """

    def __init__(
        self, parameters: Tensor, layout: BlockLayout, l2: float, averaging: AveragingSpec | None
    ) -> None:
        self.parameters = parameters
        self.layout = layout
        self.version = 0
        self.l2 = l2
        self._average = ParameterAverage(averaging.decay, averaging.start) if averaging else None

    def squares(self) -> Tensor:
        """Return the sum of squares of each block's parameters, float64 [B]."""
        return block_squares(self.layout.regions(self.parameters).values())

    def mean_gradient(self, total: Tensor, num_cases: int) -> Tensor:
        """Return the mean gradient [Q] with the l2 term, in the memory of the sum over cases."""
        return total.div_(num_cases).add_(self.parameters, alpha=self.l2)

    def applied(self, step: int) -> None:
        """Count an update that has just been made to `parameters`, and average them."""
        self.version += 1
        if self._average is not None:
            self._average.update(step, self.parameters)

    @property
    def average(self) -> ParameterAverage | None:
        """The Polyak average of this slice, None if the job has none."""
        return self._average

    def undo(self, step: int, update: Tensor) -> None:
        """Take back the update [Q] of `step`, the last one; exact to rounding."""
        self.version -= 1
        self.parameters.sub_(update)
        if self._average is not None:
            self._average.undo(step)

    def averaged(self) -> Array | None:
        """Return a copy of the averaged parameters [Q], None before there is an average."""
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
        self.version = int(snapshot.get("version", 0))
        average = to_tensors(section(snapshot, "average:"), self.parameters.device)
        if self._average is not None and average:
            self._average.load_state_dict(average)
