"""Factors of curvature blocks and their running averages (docs/algorithm.md#statistics).

The weight matrix W [dim_G, dim_A] of a layer has the bias as its last column. The curvature block
of the layer is `A (x) G`: A [dim_A, dim_A] is the second moment of its homogeneous inputs, and
G [dim_G, dim_G] is the second moment of the derivatives with respect to its outputs. Both are
means over cases of per-case quantities. If the units of a layer share no parameters, the layer has
the Fisher of each unit instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_dist.core.packing import LOWER, mirror_lower, unpack_symmetric
from kfac_dist.core.products import two_sided
from kfac_dist.core.vector import all_finite, is_finite


@dataclass(frozen=True, kw_only=True)
class KroneckerPair:
    """Two matrices that belong together: factors, their inverses, eigenbases or cross factors.

    Together they stand for `A (x) G`. Factors and inverses are symmetric. A diagonal A is stored
    as the vector [dim_A] of its diagonal.
    """

    A: Tensor
    G: Tensor

    def apply(self, matrix: Tensor) -> Tensor:
        """Return `G V A`: the product of the symmetric `A (x) G` with V [dim_G, dim_A]."""
        return two_sided(self.G, matrix, self.A)

    def map_matrices(self, change: Callable[[Tensor], Tensor]) -> KroneckerPair:
        """Return the pair of the matrices that `change` returns."""
        return KroneckerPair(A=change(self.A), G=change(self.G))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, without copying them."""
        return {"A": self.A, "G": self.G}

    def is_finite(self) -> bool:
        """Return whether no element is NaN or infinite."""
        return all_finite((self.A, self.G))


@dataclass(frozen=True, kw_only=True)
class UnitMoments:
    """One symmetric matrix for each unit of a layer: its Fisher, or the inverse of it.

    M [units, k, k] is a mean over cases; k is the number of parameters that belong to one unit.
    """

    M: Tensor

    def apply(self, matrix: Tensor) -> Tensor:
        """Return `M_u v_u` for the row v_u of V [units, k] of each unit u."""
        return (self.M @ matrix.unsqueeze(2)).squeeze(2)

    def map_matrices(self, change: Callable[[Tensor], Tensor]) -> UnitMoments:
        """Return `self`: products with matrices this small gain nothing from rounding."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensor by its name, without copying it."""
        return {"M": self.M}

    def is_finite(self) -> bool:
        """Return whether no element is NaN or infinite."""
        return is_finite(self.M)


@dataclass(frozen=True, kw_only=True)
class PackedFactors:
    """The factors of a layer as they are sent: symmetric matrices are packed (see `packing`)."""

    packed: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Return the packed tensors by name, without copying them."""
        return dict(self.packed)

    def is_finite(self) -> bool:
        """Return whether no element is NaN or infinite."""
        return all_finite(self.packed.values())


LayerFactors = KroneckerPair | UnitMoments
AveragedFactors = LayerFactors | PackedFactors
_KEYS = ("A", "G", "M", f"A{LOWER}", f"G{LOWER}")


def factors_from_tensors(tensors: Mapping[str, Tensor]) -> LayerFactors:
    """Return the factors, or inverses, with these tensors, A and G or M, without copying them."""
    if "M" in tensors:
        return UnitMoments(M=tensors["M"])
    return KroneckerPair(A=tensors["A"], G=tensors["G"])


class Link(NamedTuple):
    """Two neighbours in a chain of layers, which have cross factors.

    The cross factors `A_{i-1,i} = E[abar_{i-1} abar_i^T]` [dim_A, next dim_A] and
    `G_{i,i+1} = E[g_i g_{i+1}^T]` [dim_G, next dim_G] are stored by the name of the first layer.
    """

    name: str
    next_name: str


@dataclass(frozen=True, kw_only=True)
class LayerSnapshot:
    """What the inverse of one layer is prepared from: averages over the same cases.

    `step` is the step of the newest statistics in it. If the layer is linked to a next one,
    `next_pair` and `cross` are averages of the same statistics with the same weights.
    """

    step: int
    pair: LayerFactors
    next_pair: KroneckerPair | None = None
    cross: KroneckerPair | None = None


def old_weight(num_updates: int, decay: float) -> float:
    """Return the weight of the old value in a running average, `min(1 - 1/k, decay)`.

    `num_updates` is k: it counts the updates from 1, including this one. The first update replaces
    the old value, so no bias correction is needed.
    """
    return min(1 - 1 / num_updates, decay)


class FactorAverages:
    """The running averages of the factors of some layers, and of the cross factors of `links`.

    `S <- eps S + (1 - eps) S_batch`, `eps = min(1 - 1/k, factor_decay)` (paper 5), where k counts
    the updates of the layer from 1. Both ends of a link are among `names`; they and their cross
    factors have the same k.

    `step` is the step of the newest statistics in the averages, and 0 before the first.
    """

    def __init__(
        self, names: Iterable[str], factor_decay: float, links: Iterable[Link] = ()
    ) -> None:
        self.names = tuple(names)
        self.links = tuple(links)
        self.factor_decay = factor_decay
        self.step = 0
        self._next_names = {link.name: link.next_name for link in self.links}
        self._num_updates = dict.fromkeys(self.names, 0)
        self._averages: dict[str, AveragedFactors] = {}
        self._crosses: dict[str, AveragedFactors] = {}

    def update(
        self,
        step: int,
        sums: Mapping[str, AveragedFactors],
        num_cases: int,
        crosses: Mapping[str, KroneckerPair] | None = None,
    ) -> None:
        """Update the averages with the sums of one step, which are not kept or changed.

        The sums of a layer must be packed in every update or in none. Layers whose first sums
        share a tensor share its average from then on.

        Args:
            step: the step of the sums.
            sums: the sums over the statistics cases of the step, by layer.
            num_cases: the number of these cases.
            crosses: the sums for the cross factors, by the first layer of every link.
        """
        self.step = step
        done: dict[int, Tensor] = {}  # the averages of this update, by the id of their sum
        for name in self.names:
            self._num_updates[name] += 1
            keep = old_weight(self._num_updates[name], self.factor_decay)
            weight = (1 - keep) / num_cases
            _average_in(self._averages, name, sums[name], keep, weight, done)
            if name in self._next_names:
                assert crosses is not None, "a link needs cross factors"
                _average_in(self._crosses, name, crosses[name], keep, weight, done)

    def pair(self, name: str) -> LayerFactors:
        """Return the averaged factors of a layer, symmetrised, as new tensors.

        A product X^T X is symmetric only up to rounding. The lower triangle is used, so that a
        matrix is the same whether or not it was sent as a packed triangle.
        """
        tensors = unpack_symmetric(self._averages[name].tensors())
        return factors_from_tensors({key: _symmetric(value) for key, value in tensors.items()})

    def snapshot(self, name: str) -> LayerSnapshot:
        """Return what the inverse of a layer is prepared from, as new tensors.

        Raises:
            ValueError: the layer and the next one have not averaged the same number of batches.
        """
        next_name = self._next_names.get(name)
        if next_name is None:
            return LayerSnapshot(step=self.step, pair=self.pair(name))
        counts = self._num_updates[name], self._num_updates[next_name]
        if counts[0] != counts[1]:
            raise ValueError(
                f"layers {name!r} and {next_name!r} have averaged {counts[0]} and {counts[1]} "
                "batches; a chain needs factors of the same batches"
            )
        next_pair, cross = self.pair(next_name), _copied(self._crosses[name].tensors())
        assert isinstance(next_pair, KroneckerPair)
        assert isinstance(cross, KroneckerPair)
        return LayerSnapshot(step=self.step, pair=self.pair(name), next_pair=next_pair, cross=cross)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the averages and the counters, by flat names."""
        state = {"step": torch.tensor(self.step)}
        for name in self._averages:
            state[f"{name}/num_updates"] = torch.tensor(self._num_updates[name])
            for key, value in self.pair(name).tensors().items():
                state[f"{name}/{key}"] = value
            if name in self._crosses:
                for key, value in self._crosses[name].tensors().items():
                    state[f"{name}/cross_{key}"] = value.clone()
        return state

    def packed_state_dict(self) -> dict[str, Tensor]:
        """Return copies like `state_dict`, where factors that are packed stay packed.

        This takes less than half the time.
        """
        state = {"step": torch.tensor(self.step)}
        for name, average in self._averages.items():
            state[f"{name}/num_updates"] = torch.tensor(self._num_updates[name])
            state |= {f"{name}/{key}": value.clone() for key, value in average.tensors().items()}
            if name in self._crosses:
                crosses = self._crosses[name].tensors()
                state |= {f"{name}/cross_{key}": value.clone() for key, value in crosses.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state. Layers of this object that it lacks start from zero.

        So does a layer that is linked to one of these. Symmetric matrices are packed
        in the state if they are in the next sums.
        """
        self.step = int(state["step"])
        known = self._restorable(state)
        self._num_updates = dict.fromkeys(self.names, 0)
        self._num_updates |= {name: int(state[f"{name}/num_updates"]) for name in known}
        self._averages = {name: _copied(_saved(state, f"{name}/", _KEYS)) for name in known}
        self._crosses = {
            name: _copied(_saved(state, f"{name}/cross_", _KEYS))
            for name in known
            if name in self._next_names
        }

    def _restorable(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return the layers in a state whose whole chain has averaged the same batches."""
        counts = {
            name: int(state[f"{name}/num_updates"])
            for name in self.names
            if f"{name}/num_updates" in state
        }
        # A layer that is removed takes its neighbours with it, until nothing changes.
        left = len(counts) + 1
        while left > len(counts):
            left = len(counts)
            for name, next_name in self.links:
                whole = f"{name}/cross_A" in state and counts.get(name) == counts.get(next_name)
                if not whole:
                    counts.pop(name, None)
                    counts.pop(next_name, None)
        return [name for name in self.names if name in counts]


def _saved(state: Mapping[str, Tensor], prefix: str, keys: Iterable[str]) -> dict[str, Tensor]:
    return {key: state[prefix + key] for key in keys if prefix + key in state}


def _copied(tensors: Mapping[str, Tensor]) -> AveragedFactors:
    return _with_tensors({key: value.clone() for key, value in tensors.items()})


def _with_tensors(tensors: Mapping[str, Tensor]) -> AveragedFactors:
    is_packed = any(key.endswith(LOWER) for key in tensors)
    return PackedFactors(packed=tensors) if is_packed else factors_from_tensors(tensors)


def _symmetric(value: Tensor) -> Tensor:
    return value.clone() if value.dim() == 1 else mirror_lower(value)


def _average_in(
    averages: dict[str, AveragedFactors],
    name: str,
    new: AveragedFactors,
    keep: float,
    weight: float,
    done: dict[int, Tensor],
) -> None:
    """Update the average of a layer by `keep` times itself plus `weight` times `new`.

    `done` has the averages that this update has already dealt with, by the id of their sum:
    layers that share a sum share its average, which is updated only once.
    """
    batch = new.tensors()
    if name not in averages:
        zeros = {key: done.get(id(value), torch.zeros_like(value)) for key, value in batch.items()}
        averages[name] = _with_tensors(zeros)
    for key, average in averages[name].tensors().items():
        if done.get(id(batch[key])) is not average:
            average.mul_(keep).add_(batch[key], alpha=weight)
            done[id(batch[key])] = average
