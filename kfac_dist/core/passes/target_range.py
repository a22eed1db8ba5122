"""Which values targets may have, and which label leaves a position out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEFT_OUT = -100
"""The label of a position that counts neither in the loss nor in G: torch's `ignore_index`."""


@dataclass(frozen=True, kw_only=True)
class TargetRange:
    """The values that targets may have: `lowest` to `highest`, and LEFT_OUT if they are labels."""

    lowest: int
    highest: int
    are_labels: bool

    def __str__(self) -> str:
        if self.are_labels:
            return f"a class from {self.lowest} to {self.highest}, or {LEFT_OUT} to be left out"
        return f"between {self.lowest} and {self.highest}"

    def first_outside(self, targets: Tensor) -> tuple[int, ...] | None:
        """Return the index of the first value that is not allowed, None without one.

        NaN is not looked for.
        """
        if targets.numel() == 0 or self._all_inside(targets):
            return None
        outside = (targets < self.lowest) | (targets > self.highest)
        if self.are_labels:
            outside &= targets != LEFT_OUT
        found = outside.nonzero()
        return tuple(found[0].tolist()) if len(found) else None

    def _all_inside(self, targets: Tensor) -> bool:
        """Return whether the extremes are allowed, which two numbers decide: one sync on a GPU."""
        if targets.dtype == torch.bool:
            return True
        extremes = torch.stack(torch.aminmax(targets))
        return bool((extremes[0] >= self.lowest) & (extremes[1] <= self.highest))
