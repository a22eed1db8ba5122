"""Curvature statistics of a part of a batch, added up layer by layer (algorithm.md section 2).

Sums over cases of per-case quantities, as everything in `compute`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.core.factors import KroneckerPair, Link
from kfac_dist.core.layers import LayerBlock

# Elements of the per-case gradients [cases, dim_G, dim_A] of shared layers held at a time.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class BatchStatistics:
    """Sums over the statistics cases of a part of a batch, by layer.

    `factors` has A and G of every layer. `crosses` has, by the first layer of each link, the cross
    factors with the next. `moments` has, for each layer whose basis was given, the squares of the
    gradient of each case in that basis, [dim_G, dim_A].
    """

    factors: dict[str, KroneckerPair]
    crosses: dict[str, KroneckerPair]
    moments: dict[str, Tensor]

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors, not copied, in an order that depends on the layers alone."""
        for pair in (*self.factors.values(), *self.crosses.values()):
            yield from pair.tensors().values()
        yield from self.moments.values()

    def add_(self, other: BatchStatistics) -> None:
        """Add the sums of other cases, in place."""
        for own, more in zip(self.tensors(), other.tensors(), strict=True):
            own.add_(more)

    def is_finite(self) -> bool:
        """Tell whether no element is NaN or infinite."""
        pairs = (*self.factors.values(), *self.crosses.values())
        return all(pair.is_finite() for pair in pairs) and all(
            bool(torch.isfinite(moments).all()) for moments in self.moments.values()
        )


class StatisticsSums:
    """Adds up the statistics of `num_cases` cases: inputs once, then each derivative.

    A layer that is applied at R positions a case is treated by *expand*: A is the mean and G the
    sum over positions; several calls of a module are so many more positions. Linked layers that
    are applied at different numbers of positions are taken to be uncorrelated.
    """

    def __init__(
        self,
        blocks: Sequence[LayerBlock],
        num_cases: int,
        links: Iterable[Link],
        bases: Mapping[str, KroneckerPair],
    ) -> None:
        self._blocks = blocks
        self._num_cases = num_cases
        self._links = tuple(links)
        self._bases = bases
        self._inputs: dict[str, list[Tensor]] = {}
        self.sums = _zeros(blocks, self._links, bases)

    def add_inputs(self, inputs: Mapping[str, Sequence[Tensor]]) -> None:
        """Take in the inputs of each layer, one entry a call of its module, [cases, ..., in]."""
        self._inputs = {
            block.name: [_homogeneous(block, call) for call in inputs[block.name]]
            for block in self._blocks
        }
        rows = {name: torch.cat(calls) for name, calls in self._inputs.items()}
        for name, pair in self.sums.factors.items():
            moment, positions = rows[name].T @ rows[name], len(rows[name]) // self._num_cases
            pair.A.add_(moment if positions == 1 else moment / positions)
        for name, next_name in self._links:
            if len(rows[name]) == len(rows[next_name]):
                positions = len(rows[name]) // self._num_cases
                self.sums.crosses[name].A.add_(rows[name].T @ rows[next_name] / positions)

    def add_gradients(self, gradients: Mapping[str, Sequence[Tensor]]) -> None:
        """Add derivatives with respect to the outputs, in the order of the inputs' calls."""
        calls = {
            block.name: [call.reshape(-1, block.dim_G) for call in gradients[block.name]]
            for block in self._blocks
        }
        for name, pair in self.sums.factors.items():
            for call in calls[name]:
                pair.G.addmm_(call.T, call)
        for name, next_name in self._links:
            rows, next_rows = torch.cat(calls[name]), torch.cat(calls[next_name])
            if len(rows) == len(next_rows):
                self.sums.crosses[name].G.addmm_(rows.T, next_rows)
        for name, basis in self._bases.items():
            moments = case_moments(
                self._by_case(self._inputs[name]), self._by_case(calls[name]), basis
            )
            self.sums.moments[name].add_(moments)

    def _by_case(self, calls: Sequence[Tensor]) -> Tensor:
        """Return the rows of all calls as [cases, positions, features]."""
        return torch.cat(
            [call.reshape(self._num_cases, -1, call.shape[-1]) for call in calls], dim=1
        )


def _zeros(
    blocks: Sequence[LayerBlock], links: Iterable[Link], bases: Mapping[str, KroneckerPair]
) -> BatchStatistics:
    by_name = {block.name: block for block in blocks}

    def pair(name: str, other: str) -> KroneckerPair:
        like, left, right = by_name[name].module.weight, by_name[name], by_name[other]
        return KroneckerPair(
            A=like.new_zeros((left.dim_A, right.dim_A)),
            G=like.new_zeros((left.dim_G, right.dim_G)),
        )

    return BatchStatistics(
        factors={name: pair(name, name) for name in by_name},
        crosses={name: pair(name, next_name) for name, next_name in links},
        moments={
            name: basis.A.new_zeros((len(basis.G), len(basis.A))) for name, basis in bases.items()
        },
    )


def _homogeneous(block: LayerBlock, inputs: Tensor) -> Tensor:
    """Return the inputs of one call as rows, with a 1 for the bias, [rows, dim_A]."""
    rows = inputs.reshape(-1, block.module.in_features)
    if block.bias_offset is None:
        return rows
    return torch.cat([rows, rows.new_ones((len(rows), 1))], dim=1)


def case_moments(inputs: Tensor, gradients: Tensor, basis: KroneckerPair) -> Tensor:
    """Return the sum over cases of `(Q_G^T DW Q_A)^2`, [dim_G, dim_A].

    DW is the gradient of one case: the sum of `g abar^T` over the positions of `inputs`
    [cases, positions, dim_A] and `gradients` [cases, positions, dim_G].
    """
    a, g = inputs @ basis.A, gradients @ basis.G
    if a.shape[1] == 1:
        return g.squeeze(1).square().T @ a.squeeze(1).square()
    size = max(1, _CHUNK_ELEMENTS // (a.shape[2] * g.shape[2]))
    chunks = zip(torch.split(a, size), torch.split(g, size), strict=True)
    sums = [(part_g.mT @ part_a).square().sum(dim=0) for part_a, part_g in chunks]
    return torch.stack(sums).sum(dim=0)
