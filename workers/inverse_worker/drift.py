"""How far the factors of layers have moved since they were last inverted."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from kfac_dist.core.factors import FactorAverages


class FactorDrift:
    """Relative changes of averaged factors, by layer.

    Each is computed once for every step of statistics, however often it is asked for.
    """

    def __init__(self) -> None:
        self._inverted: dict[str, Mapping[str, Tensor]] = {}
        self._known: dict[str, tuple[int, float]] = {}

    def of(self, names: Collection[str]) -> FactorDrift:
        """Return what is known of these layers."""
        kept = FactorDrift()
        kept._inverted = {name: self._inverted[name] for name in names if name in self._inverted}
        kept._known = {name: self._known[name] for name in names if name in self._known}
        return kept

    def start_from(self, name: str, inverted: Mapping[str, Tensor]) -> None:
        """Remember the factors that a layer's newest inverse was made from; they are not copied."""
        self._inverted[name] = inverted
        self._known.pop(name, None)

    def since_inverted(self, name: str, averages: FactorAverages) -> float:
        """Return the change of a layer's factors, 0 before they were first inverted."""
        if name not in self._inverted:
            return 0.0
        if self._known.get(name, (0, 0.0))[0] != averages.step:
            drift = relative_change(self._inverted[name], averages.pair(name).tensors())
            self._known[name] = (averages.step, drift)
        return self._known[name][1]


def relative_change(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> float:
    """Return the largest change of a tensor, relative to its old Frobenius norm."""
    norms = [
        norm
        for name, before in old.items()
        for norm in map(torch.linalg.vector_norm, (before, new[name] - before))
    ]
    numbers: list[float] = torch.stack(norms).tolist()  # one transfer to the host
    changes = []
    for size, change in zip(numbers[::2], numbers[1::2], strict=True):
        relative = change / size if size > 0 else float("inf") if change > 0 else 0.0
        # If both norms overflow, the quotient is inf / inf, which is NaN.
        changes.append(float("inf") if math.isnan(relative) else relative)
    return max(changes)
