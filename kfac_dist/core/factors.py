"""Kronecker factors and their running averages (algorithm.md sections 2 and 3).

The curvature block of a layer with weight matrix W [dim_G, dim_A], the bias its last column, is
`A (x) G`: A [dim_A, dim_A] the second moment of its homogeneous inputs, G [dim_G, dim_G] the
second moment of the derivatives with respect to its outputs, both means over cases of per-case
quantities.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.core.packing import mirror_lower


@dataclass(frozen=True, kw_only=True)
class KroneckerPair:
    """Two symmetric matrices that belong together: factors, or their inverses."""

    A: Tensor
    G: Tensor

    def is_finite(self) -> bool:
        """Tell whether no element is NaN or infinite."""
        return bool(torch.isfinite(self.A).all() and torch.isfinite(self.G).all())


class FactorAverages:
    """The running averages of the factors of some layers.

    `S <- eps S + (1 - eps) S_batch`, `eps = min(1 - 1/k, factor_decay)`, k counting the updates of
    the layer from 1, so that its first update needs no bias correction.

    `step` is the step of the newest statistics in the averages, 0 before the first.
    """

    def __init__(self, names: Iterable[str], factor_decay: float) -> None:
        self.names = tuple(names)
        self.factor_decay = factor_decay
        self.step = 0
        self._num_updates = dict.fromkeys(self.names, 0)
        self._averages: dict[str, KroneckerPair] = {}

    def update(self, step: int, sums: Mapping[str, KroneckerPair], num_cases: int) -> None:
        """Take in the sums over the `num_cases` statistics cases of one step.

        The sums are not kept and not changed.
        """
        self.step = step
        for name in self.names:
            self._num_updates[name] += 1
            keep = min(1 - 1 / self._num_updates[name], self.factor_decay)
            weight = (1 - keep) / num_cases
            new = sums[name]
            if name not in self._averages:
                self._averages[name] = KroneckerPair(
                    A=torch.zeros_like(new.A), G=torch.zeros_like(new.G)
                )
            old = self._averages[name]
            for average, batch in ((old.A, new.A), (old.G, new.G)):
                average.mul_(keep).add_(batch, alpha=weight)

    def pair(self, name: str) -> KroneckerPair:
        """Return the averaged factors of a layer, symmetrised, as new tensors.

        A product X^T X is symmetric only to rounding; its lower triangle is taken to be the truth,
        so that a matrix that travelled as a packed triangle is the same matrix.
        """
        average = self._averages[name]
        return KroneckerPair(A=mirror_lower(average.A), G=mirror_lower(average.G))

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the averages and counters, by flat names."""
        state = {"step": torch.tensor(self.step)}
        for name in self._averages:
            pair = self.pair(name)
            state[f"{name}/num_updates"] = torch.tensor(self._num_updates[name])
            state[f"{name}/A"] = pair.A
            state[f"{name}/G"] = pair.G
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state: of this object's layers those it has; the others start anew."""
        self.step = int(state["step"])
        known = [name for name in self.names if f"{name}/A" in state]
        self._num_updates = dict.fromkeys(self.names, 0)
        self._num_updates |= {name: int(state[f"{name}/num_updates"]) for name in known}
        self._averages = {
            name: KroneckerPair(A=state[f"{name}/A"].clone(), G=state[f"{name}/G"].clone())
            for name in known
        }
