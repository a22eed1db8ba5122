"""Curvature statistics of a part of a batch, added up layer by layer.

Like everything in `compute`, they are sums over cases of per-case quantities
(docs/algorithm.md#fisher, docs/algorithm.md#scale).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kfac_dist.core.blocks.block import LayerBlock
from kfac_dist.core.blocks.registration import Registration
from kfac_dist.core.blocks.sites import Site
from kfac_dist.core.factors import KroneckerPair, LayerFactors, Link
from kfac_dist.core.passes.capture import Captures, Gradients
from kfac_dist.core.passes.case_axes import CaseAxes, CaseAxis, NoAxis, Place
from kfac_dist.core.statistics.site_sums import KroneckerSums, SiteCall, SiteSums
from kfac_dist.core.statistics.unit_sums import DiagonalSums, sums_for
from kfac_dist.core.vector import all_finite, is_finite
from kfac_dist.errors import InvalidSpecError

FisherType = Literal["mc", "exact", "empirical"]

# Elements of per-case gradients [cases, dim_G, dim_A] that are held at a time.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class BatchStatistics:
    """Sums over the statistics cases of a part of a batch, by block.

    `factors` has the factors of every block; blocks of one layer may share tensors. `crosses` has
    the cross factors of each link, by the first of its layers. `moments` has the squared gradients
    of cases in an eigenbasis, [dim_G, dim_A], for each layer whose basis was given.
    """

    factors: dict[str, LayerFactors]
    crosses: dict[str, KroneckerPair]
    moments: dict[str, Tensor]

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor once, without a copy, in an order that only the layers determine."""
        by_layer = (*self.factors.values(), *self.crosses.values())
        tensors = [tensor for pair in by_layer for tensor in pair.tensors().values()]
        tensors += self.moments.values()
        yield from {id(tensor): tensor for tensor in tensors}.values()

    def add_(self, other: BatchStatistics) -> None:
        """Add the sums of other cases, in place."""
        for own, more in zip(self.tensors(), other.tensors(), strict=True):
            own.add_(more)

    def is_finite(self) -> bool:
        """Return whether no element is NaN or infinite.

        Factors are judged by their diagonals, which takes a thousandth of the time: no element of
        a second moment is larger than the largest on its diagonal, which is a sum of squares.
        """
        factors = {id(t): t for pair in self.factors.values() for t in pair.tensors().values()}
        crosses = [t for pair in self.crosses.values() for t in pair.tensors().values()]
        return all_finite([*map(_diagonal, factors.values()), *crosses, *self.moments.values()])

    def not_finite(self) -> list[str]:
        """Return the layers with an element that is NaN or infinite, in order."""
        return [
            name
            for name, pair in self.factors.items()
            if not (
                pair.is_finite()
                and (name not in self.crosses or self.crosses[name].is_finite())
                and (name not in self.moments or is_finite(self.moments[name]))
            )
        ]


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.dim() == 1 else factor.diagonal(dim1=-2, dim2=-1)


class StatisticsSums:
    """Adds up the statistics of a pass in `sums`: inputs once, then each derivative.

    Linked layers that are applied at different numbers of positions are taken to be uncorrelated.

    Args:
        registration: the blocks of the model.
        fisher_type: decides whether calls without an axis of cases are possible.
        num_cases: the number of cases in the pass.
        like: a tensor with the dtype and the device of the parameters.
        links: the pairs of layers whose cross factors are wanted.
        bases: the eigenbases of layers in which moments are wanted.
    """

    def __init__(
        self,
        registration: Registration,
        fisher_type: FisherType,
        num_cases: int,
        like: Tensor,
        links: Iterable[Link],
        bases: Mapping[str, KroneckerPair],
    ) -> None:
        self._num_cases = num_cases
        self._reduces = registration.weight_sharing == "reduce"
        self._fisher_type = fisher_type
        self._links = tuple(links)
        self._bases = bases
        self._sites = [
            sums_for(site, num_cases, like, registration.weight_sharing)
            for site in registration.sites
        ]
        self.sites: tuple[SiteSums, ...] = tuple(self._sites)
        self._blocks: dict[str, tuple[SiteSums, LayerBlock]] = {
            block.name: (sums, block) for sums in self._sites for block in sums.site.blocks
        }
        self.sums = BatchStatistics(
            factors={name: sums.factors[name] for name, (sums, _) in self._blocks.items()},
            crosses={name: self._zero_cross(name, following, like) for name, following in links},
            moments={
                name: like.new_zeros((len(basis.G), len(basis.A))) for name, basis in bases.items()
            },
        )

    def _zero_cross(self, name: str, next_name: str, like: Tensor) -> KroneckerPair:
        left, right = self._blocks[name][1], self._blocks[next_name][1]
        return KroneckerPair(
            A=like.new_zeros((left.dim_A, right.dim_A)),
            G=like.new_zeros((left.dim_G, right.dim_G)),
        )

    def add_inputs(self, captures: Captures, axes: CaseAxes) -> None:
        """Add the inputs of the calls of each module, whose cases lie along `axes`.

        Raises:
            InvalidSpecError: a call has no axis of cases, or it is not known which one it is, but
                the gradients of cases are needed.
        """
        for sums in self._sites:
            sums.add_inputs(list(self._calls(sums.site, captures, axes)))
        for name, next_name in self._links:
            left, right = self._kronecker(name), self._kronecker(next_name)
            rows, next_rows = left.averaged_inputs, right.averaged_inputs
            if self._linked(left, rows, right, next_rows):
                positions = len(torch.cat(rows)) // self._num_cases
                cross = torch.cat(rows).T @ torch.cat(next_rows)
                self.sums.crosses[name].A.add_(cross / positions)

    def _calls(self, site: Site, captures: Captures, axes: CaseAxes) -> Iterator[SiteCall]:
        """Yield the calls of the modules of a site, in order; a diagonal site observes none."""
        if site.rule is None:
            return
        for owner, module in zip(site.owners, site.modules, strict=True):
            for call in captures[module]:
                inputs, place = call.inputs, axes.of_call(module, call.number)
                axis = self._usable(place, site.rule.num_leading_axes(module, inputs), inputs)
                if axis is not None:
                    rows = axis.rows(inputs, self._num_cases)
                    yield SiteCall(site.rule, module, rows, self._num_cases, axis)
                    continue
                known = place is NoAxis.WITHOUT_CASES
                if known:
                    self._check_sampled(owner, inputs)
                has_axis = site.rule.has_case_axis(module, inputs, self._num_cases)
                single = known or not has_axis or self._needs_cases(site)
                if single and not known:
                    self._check_known(owner, inputs)
                num_cases = 1 if single else self._num_cases
                yield SiteCall(site.rule, module, inputs, num_cases)

    def _usable(self, place: Place, num_axes: int, inputs: Tensor) -> CaseAxis | None:
        """Return where the cases lie if the rows of a call can be brought into their order."""
        if not isinstance(place, CaseAxis) or place.axis >= num_axes:
            return None
        return place if place.fits(inputs, self._num_cases) else None

    def _needs_cases(self, site: Site) -> bool:
        """Return whether the sums of a site need to know which rows belong to one case."""
        has_moments = any(block.name in self._bases for block in site.blocks)
        return self._num_cases > 1 and (self._reduces or has_moments or site.kind == "unit-wise")

    def _check_known(self, owner: str, inputs: Tensor) -> None:
        """Refuse an input whose cases are not known, where a sum over all of them will not do.

        The square of a sum of sampled derivatives will: see `site_sums`.
        """
        if self._fisher_type == "mc" and not self._reduces:
            return
        setting = "weight_sharing: reduce" if self._reduces else f"fisher_type: {self._fisher_type}"
        raise InvalidSpecError(
            f"layer {owner}: nothing shows which part of its input {tuple(inputs.shape)} belongs "
            f"to which of the {self._num_cases} cases, which {setting} needs. Call it with [cases, "
            "positions, ...], ask for a diagonal block with diagonal, or use fisher_type: mc with "
            "weight_sharing: expand"
        )

    def _check_sampled(self, owner: str, inputs: Tensor) -> None:
        """Refuse an input without an axis of cases unless the targets are sampled."""
        if self._fisher_type == "mc":
            return
        raise InvalidSpecError(
            f"layer {owner}: its input {tuple(inputs.shape)} has no axis of the {self._num_cases} "
            f"cases, which fisher_type: {self._fisher_type} needs; expand it over the cases, as in "
            "positions.expand(len(inputs), -1), or use fisher_type: mc"
        )

    def _kronecker(self, name: str) -> KroneckerSums:
        sums = self._blocks[name][0]
        assert isinstance(sums, KroneckerSums)
        return sums

    @staticmethod
    def _linked(
        left: KroneckerSums, rows: list[Tensor], right: KroneckerSums, next_rows: list[Tensor]
    ) -> bool:
        """Return whether the rows of two layers correspond one to one."""
        if not (rows and next_rows and left.has_cases and right.has_cases):
            return False
        return sum(map(len, rows)) == sum(map(len, next_rows))

    def add_gradients(self, gradients: Gradients) -> None:
        """Add derivatives with respect to the outputs of the calls whose inputs were added.

        Sums of several derivatives, as for the columns of a root, are added by several calls.
        """
        for sums in self._sites:
            derivatives = [g for module in sums.site.modules for g in gradients[module]]
            pairs = zip(sums.calls, derivatives, strict=True)
            sums.add_gradients([call.rows(gradient) for call, gradient in pairs])
        for name, next_name in self._links:
            left, right = self._kronecker(name), self._kronecker(next_name)
            rows, next_rows = left.added_gradients, right.added_gradients
            if self._linked(left, rows, right, next_rows):
                self.sums.crosses[name].G.addmm_(torch.cat(rows).T, torch.cat(next_rows))
        for name, basis in self._bases.items():
            self._add_moments(name, basis)

    def _add_moments(self, name: str, basis: KroneckerPair) -> None:
        sums, block = self._kronecker(name), self._blocks[name][1]
        if not sums.calls:
            return
        # The rows of a block count from those of the whole layer; a site may begin later.
        first = sums.site.first_row
        rows = slice(block.rows[0] - first, block.rows[1] - first)
        inputs = sums.case_inputs()[..., slice(*block.columns)]
        self.sums.moments[name].add_(case_moments(inputs, sums.case_gradients()[..., rows], basis))

    def add_squares(self, squares: Mapping[str, Tensor]) -> None:
        """Add the sums over cases of squared gradients, by parameter, to the diagonal blocks."""
        for sums in self._sites:
            if isinstance(sums, DiagonalSums):
                sums.add_squares(squares[sums.site.parameters[0]])


def case_moments(inputs: Tensor, gradients: Tensor, basis: KroneckerPair) -> Tensor:
    """Return the sum over cases of `(Q_G^T DW Q_A)^2`, [dim_G, dim_A] (docs/algorithm.md#ekfac).

    DW is the gradient of one case: the sum of `g abar^T` over the positions of `inputs`
    [cases, positions, dim_A] and `gradients` [cases, positions, dim_G].
    """
    a, g = inputs @ basis.A, gradients @ basis.G
    # With one position, the square of a product is the product of squares: one matrix product.
    if a.shape[1] == 1:
        return g.squeeze(1).square().T @ a.squeeze(1).square()
    size = max(1, _CHUNK_ELEMENTS // (a.shape[2] * g.shape[2]))
    chunks = zip(torch.split(a, size), torch.split(g, size), strict=True)
    sums = [(part_g.mT @ part_a).square().sum(dim=0) for part_a, part_g in chunks]
    return torch.stack(sums).sum(dim=0)
