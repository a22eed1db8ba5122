"""Iterate averaging of the parameters (docs/algorithm.md#averaging; paper 13)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kfac_dist.core.factors import old_weight


class ParameterAverage:
    """Polyak average of the parameter vector from step `start` on.

    `average <- xi_j average + (1 - xi_j) theta`, `xi_j = min(1 - 1/j, decay)`, where j counts the
    averaged iterates from 1.
    """

    def __init__(self, decay: float, start: int) -> None:
        self.decay = decay
        self.start = start
        self.num_averaged = 0
        self._average: Tensor | None = None
        self._before: Tensor | None = None  # the average before the last update

    def update(self, step: int, parameters: Tensor) -> None:
        """Average in the parameter vector [P] after `step`; the tensor itself is not kept."""
        if step < self.start:
            return
        self.num_averaged += 1
        old = torch.zeros_like(parameters) if self._average is None else self._average
        keep = old_weight(self.num_averaged, self.decay)
        memory = torch.empty_like(parameters) if self._before is None else self._before
        self._average = torch.mul(old, keep, out=memory).add_(parameters, alpha=1 - keep)
        self._before = old

    def undo(self, step: int) -> None:
        """Take back the update of `step`, which must be the last one; it can be done once."""
        if step < self.start:
            return
        self.num_averaged -= 1
        self._average, self._before = (self._before if self.num_averaged else None), None

    def start_from(self, num_averaged: int, average: Tensor | None) -> None:
        """Continue with an average [P] of this many iterates, which is kept, not copied."""
        self.num_averaged, self._average, self._before = num_averaged, average, None

    @property
    def value(self) -> Tensor | None:
        """The averaged vector [P], or None before the first averaged step."""
        return self._average

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the state, by flat names."""
        state = {"num_averaged": torch.tensor(self.num_averaged)}
        if self._average is not None:
            state["average"] = self._average.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a copy of `state`."""
        self.num_averaged = int(state["num_averaged"])
        self._average = state["average"].clone() if "average" in state else None
