"""Factors of curvature blocks and their running averages (algorithm.md sections 2 and 3).

The curvature block of a layer with weight matrix W [dim_G, dim_A], the bias its last column, is
`A (x) G`: A [dim_A, dim_A] the second moment of its homogeneous inputs, G [dim_G, dim_G] the
second moment of the derivatives with respect to its outputs, both means over cases of per-case
quantities. Layers whose units share no parameters have the Fisher of each unit instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_dist.core.packing import LOWER, mirror_lower, unpack_symmetric
from kfac_dist.core.products import two_sided
from kfac_dist.core.vector import is_finite


@dataclass(frozen=True, kw_only=True)
class KroneckerPair:
    """Two matrices that belong together: factors, their inverses, bases or cross factors.

    Symmetric but for bases and cross factors. Together they stand for `A (x) G`. A diagonal A is
    the vector [dim_A] of its diagonal.
    """

    A: Tensor
    G: Tensor

    def apply(self, matrix: Tensor) -> Tensor:
        """Return `G V A`: the product of the symmetric `A (x) G` with V [dim_G, dim_A]."""
        return two_sided(self.G, matrix, self.A)

    def map_matrices(self, change: Callable[[Tensor], Tensor]) -> KroneckerPair:
        """Return the pair of the changed matrices."""
        return KroneckerPair(A=change(self.A), G=change(self.G))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, not copied."""
        return {"A": self.A, "G": self.G}

    def is_finite(self) -> bool:
        """Tell whether no element is NaN or infinite."""
        return is_finite(self.A) and is_finite(self.G)


@dataclass(frozen=True, kw_only=True)
class UnitMoments:
    """One symmetric matrix for each unit of a layer: its Fisher, or the inverse of that.

    M [units, k, k] is about the k parameters that only that unit has, a mean over cases.
    """

    M: Tensor

    def apply(self, matrix: Tensor) -> Tensor:
        """Return `M_u v_u` for every unit's row of V [units, k]."""
        return (self.M @ matrix.unsqueeze(2)).squeeze(2)

    def map_matrices(self, change: Callable[[Tensor], Tensor]) -> UnitMoments:
        """Return them unchanged: products with matrices this small gain nothing from rounding."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensor by its name, not copied."""
        return {"M": self.M}

    def is_finite(self) -> bool:
        """Tell whether no element is NaN or infinite."""
        return is_finite(self.M)


@dataclass(frozen=True, kw_only=True)
class PackedFactors:
    """The factors of a layer as they travel: its tensors, symmetric matrices packed (`packing`)."""

    packed: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Return the packed tensors by name, not copied."""
        return dict(self.packed)

    def is_finite(self) -> bool:
        """Tell whether no element is NaN or infinite."""
        return all(is_finite(tensor) for tensor in self.packed.values())


LayerFactors = KroneckerPair | UnitMoments
AveragedFactors = LayerFactors | PackedFactors
_KEYS = ("A", "G", "M", f"A{LOWER}", f"G{LOWER}")


def factors_from_tensors(tensors: Mapping[str, Tensor]) -> LayerFactors:
    """Return the factors, or inverses, that have these tensors: A and G, or M; they are kept."""
    if "M" in tensors:
        return UnitMoments(M=tensors["M"])
    return KroneckerPair(A=tensors["A"], G=tensors["G"])


class Link(NamedTuple):
    """Two neighbours of a chain of layers: their cross factors are kept too.

    The cross factors `A_{i-1,i} = E[abar_{i-1} abar_i^T]` [dim_A, next dim_A] and
    `G_{i,i+1} = E[g_i g_{i+1}^T]` [dim_G, next dim_G] go by the name of the first of the two.
    """

    name: str
    next_name: str


@dataclass(frozen=True, kw_only=True)
class LayerSnapshot:
    """What the inverse of one layer is prepared from: means over one and the same set of cases.

    `step` is the step of the newest statistics in it. With a next layer in a chain, `next_pair`
    and `cross` are averages of the same statistics with the same weights.
    """

    step: int
    pair: LayerFactors
    next_pair: KroneckerPair | None = None
    cross: KroneckerPair | None = None


def old_weight(num_updates: int, decay: float) -> float:
    """Return the weight of the old value in a running average, `min(1 - 1/k, decay)`.

    `num_updates` is k, which counts the updates from 1 and includes this one. The first update
    replaces the old value, so no bias correction is needed.
    """
    return min(1 - 1 / num_updates, decay)


class FactorAverages:
    """The running averages of the factors of some layers, and of the cross factors of `links`.

    `S <- eps S + (1 - eps) S_batch`, `eps = min(1 - 1/k, factor_decay)`, k counting the updates of
    the layer from 1, so that its first update needs no bias correction. Both ends of a link are
    among `names`; they and their cross factors have the same k.

    `step` is the step of the newest statistics in the averages, 0 before the first.
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
        """Take in the sums over the `num_cases` statistics cases of one step.

        `crosses` has those of every link. The sums are not kept and not changed. A layer's are
        packed every time, or never. Layers that have one tensor in common in their first update
        have an average in common from then on.
        """
        self.step = step
        done: dict[int, Tensor] = {}
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

        A product X^T X is symmetric only to rounding; its lower triangle is taken to be the truth,
        so that a matrix that travelled as a packed triangle is the same matrix.
        """
        tensors = unpack_symmetric(self._averages[name].tensors())
        return factors_from_tensors({key: _symmetric(value) for key, value in tensors.items()})

    def snapshot(self, name: str) -> LayerSnapshot:
        """Return what the inverse of a layer is prepared from, as new tensors.

        Raises:
            ValueError: the two ends of a link have averaged different statistics.
        """
        next_name = self._next_names.get(name)
        if next_name is None:
            return LayerSnapshot(step=self.step, pair=self.pair(name))
        counts = self._num_updates[name], self._num_updates[next_name]
        if counts[0] != counts[1]:
            raise ValueError(
                f"layers {name!r} and {next_name!r} have averaged {counts[0]} and {counts[1]} "
                "batches; a chain needs factors of one snapshot"
            )
        next_pair, cross = self.pair(next_name), _copied(self._crosses[name].tensors())
        assert isinstance(next_pair, KroneckerPair)
        assert isinstance(cross, KroneckerPair)
        return LayerSnapshot(step=self.step, pair=self.pair(name), next_pair=next_pair, cross=cross)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the averages and counters, by flat names."""
        state = {"step": torch.tensor(self.step)}
        for name in self._averages:
            state[f"{name}/num_updates"] = torch.tensor(self._num_updates[name])
            for key, value in self.pair(name).tensors().items():
                state[f"{name}/{key}"] = value
            if name in self._crosses:
                for key, value in self._crosses[name].tensors().items():
                    state[f"{name}/cross_{key}"] = value.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state: of this object's layers those it has; the others start anew.

        So do layers that are linked with one that does. Symmetric matrices of the state may be
        packed, and are if those of the next sums are.
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
        """Return the layers of a state that, with all they are linked to, are of one snapshot."""
        counts = {
            name: int(state[f"{name}/num_updates"])
            for name in self.names
            if f"{name}/num_updates" in state
        }
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
    return _of_form({key: value.clone() for key, value in tensors.items()})


def _of_form(tensors: Mapping[str, Tensor]) -> AveragedFactors:
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
    """Take `new` into the average of a layer; `done` has what is new in this update, by identity.

    An average that layers share has the sums that they share: it is updated once.
    """
    batch = new.tensors()
    if name not in averages:
        zeros = {key: done.get(id(value), torch.zeros_like(value)) for key, value in batch.items()}
        averages[name] = _of_form(zeros)
    for key, average in averages[name].tensors().items():
        if done.get(id(batch[key])) is not average:
            average.mul_(keep).add_(batch[key], alpha=weight)
            done[id(batch[key])] = average
