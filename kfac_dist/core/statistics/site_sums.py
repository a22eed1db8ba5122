"""Sums over cases of the factors of one site, from the calls of its modules.

With cases n and positions r, the gradient of one case is the sum of `g_nr a_nr^T` over its
positions. All calls of all modules of a site are positions of the same weight.

In a call whose input has no axis of cases, autograd sums the derivatives of all cases. If these
are independent samples of mean zero (sampled targets), the square of the sum is an unbiased
estimate of the sum of squares. Such a call therefore counts as one case, and its inputs count for
every case.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_dist.core.blocks.block import Range
from kfac_dist.core.blocks.layer_rules import LayerRule
from kfac_dist.core.blocks.sites import Site, WeightSharing
from kfac_dist.core.factors import KroneckerPair, LayerFactors
from kfac_dist.core.passes.case_axes import CaseAxis

# Columns of X^T X computed at a time. Narrower panels skip more of the upper triangle, but their
# products are less efficient.
_PANEL = 256


class SiteCall(NamedTuple):
    """The input of one call of a module, its rows case by case, and the rule that reads it.

    `num_cases` is 1 if the input has no axis of cases. `axis` is where the module has the cases,
    None if its rows are case by case already.
    """

    rule: LayerRule[Any]
    module: nn.Module
    inputs: Tensor
    num_cases: int
    axis: CaseAxis | None = None

    def rows(self, gradient: Tensor) -> Tensor:
        """Return the derivative with respect to the output of the call, its rows case by case."""
        return gradient if self.axis is None else self.axis.rows(gradient, self.num_cases)


class ObservedGradient(NamedTuple):
    """The gradient of a site's matrix [rows, columns], summed over cases and positions.

    `scale` is the root of the sum of the squared norms of its terms: what their sum would have for
    a norm if they were independent.
    """

    matrix: Tensor
    scale: Tensor


class SiteSums(ABC):
    """The sums of one site over `num_cases` cases."""

    factors: dict[str, LayerFactors]

    def __init__(
        self, site: Site, num_cases: int, like: Tensor, weight_sharing: WeightSharing
    ) -> None:
        self.site = site
        self.num_cases = num_cases
        self.calls: Sequence[SiteCall] = ()
        self._reduces = weight_sharing == "reduce"

    @property
    def has_cases(self) -> bool:
        """Whether the derivatives of single cases are known."""
        return all(call.num_cases == self.num_cases for call in self.calls)

    @abstractmethod
    def add_inputs(self, calls: Sequence[SiteCall]) -> None:
        """Add the inputs of all calls of the pass, before any gradients."""

    @abstractmethod
    def add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Add derivatives with respect to the outputs of these calls, one tensor for each.

        Their rows are in the order that `SiteCall.rows` gives them.
        """

    @abstractmethod
    def observed_gradient(self) -> ObservedGradient | None:
        """Return the gradient that the last derivatives added give; None if none is observed."""


class KroneckerSums(SiteSums):
    """The sums A and G of a site with Kronecker factors.

    Blocks with the same columns share one tensor A, blocks with the same rows one tensor G.

    *Expand*: A is a mean and G a sum over positions. *Reduce*: A is the second moment of the mean
    of a case's inputs, and G that of the sum of its derivatives.

    `inputs` and `gradients` have the rows of each call, [rows, dim]. `averaged_inputs` and
    `added_gradients` are the rows whose second moments A and G are; unless the positions are
    *reduced*, they are the same.
    """

    def __init__(
        self, site: Site, num_cases: int, like: Tensor, weight_sharing: WeightSharing
    ) -> None:
        super().__init__(site, num_cases, like, weight_sharing)
        self.inputs: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.averaged_inputs: list[Tensor] = []
        self.added_gradients: list[Tensor] = []
        self._like = like
        widths = {b.columns: b.dim_A for b in site.blocks}
        heights = {b.rows: b.dim_G for b in site.blocks}
        self._A = {columns: self._zero_A(width) for columns, width in widths.items()}
        self._G = {rows: like.new_zeros((height, height)) for rows, height in heights.items()}
        self.factors = {
            b.name: KroneckerPair(A=self._A[b.columns], G=self._G[b.rows]) for b in site.blocks
        }

    def _zero_A(self, width: int) -> Tensor:
        return self._like.new_zeros((width, width))

    def add_inputs(self, calls: Sequence[SiteCall]) -> None:
        """Add to A."""
        self.calls = calls
        self.inputs = [self._homogeneous(call) for call in calls]
        positions = sum(
            len(rows) // call.num_cases for rows, call in zip(self.inputs, calls, strict=True)
        )
        if self._reduces and positions > 1:
            sums = [
                rows.reshape(call.num_cases, -1, rows.shape[1]).sum(dim=1)
                for rows, call in zip(self.inputs, calls, strict=True)
            ]
            # A call without cases has one row here, which is added to those of all cases.
            mean = reduce(torch.add, sums) / positions
            self.averaged_inputs = [mean]
            self._add_to_A(mean, len(mean), 1)
            return
        self.averaged_inputs = self.inputs
        for rows, call in zip(self.inputs, calls, strict=True):
            self._add_to_A(rows, call.num_cases, positions)

    def _add_to_A(self, rows: Tensor, num_cases: int, positions: int) -> None:
        divisor = positions * num_cases / self.num_cases
        for columns, A in self._A.items():
            add_second_moment(A, _columns(rows, columns), weight=1 / divisor)

    def add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Add to G."""
        self.gradients = [
            _flat(call.rule.output_rows(call.module, gradient, self.site.group))
            for call, gradient in zip(self.calls, gradients, strict=True)
        ]
        self.added_gradients = (
            [self.case_gradients().sum(dim=1)] if self._reduces and self.calls else self.gradients
        )
        first = self.site.first_row
        for (start, end), G in self._G.items():
            for call in self.added_gradients:
                add_second_moment(G, _columns(call, (start - first, end - first)))

    def observed_gradient(self) -> ObservedGradient | None:
        """Return the sum of `g abar^T` over the rows of all calls."""
        if not self.calls:
            return None
        pairs = list(zip(self.gradients, self.inputs, strict=True))
        squares = [(g.square().sum(dim=1) * a.square().sum(dim=1)).sum() for g, a in pairs]
        matrix = reduce(torch.add, [g.T @ a for g, a in pairs])
        return ObservedGradient(matrix, reduce(torch.add, squares).sqrt())

    def case_inputs(self) -> Tensor:
        """Return the inputs of all calls as [cases, positions, dim_A]."""
        return self._by_case(self.inputs)

    def case_gradients(self) -> Tensor:
        """Return the derivatives at all calls as [cases, positions, dim_G]."""
        return self._by_case(self.gradients)

    def _by_case(self, calls: Sequence[Tensor]) -> Tensor:
        num_cases = self.num_cases if self.has_cases else 1
        return torch.cat([call.reshape(num_cases, -1, call.shape[-1]) for call in calls], dim=1)

    def _homogeneous(self, call: SiteCall) -> Tensor:
        """Return the inputs of one call as rows, with a 1 for the bias, [rows, dim_A]."""
        rows = _flat(call.rule.input_rows(call.module, call.inputs, self.site.group))
        if not self.site.has_bias:
            return rows
        ones = rows.new_ones((len(rows), 1))
        return torch.cat([rows, ones], dim=1) if self.site.has_weight else ones


class IndexSums(KroneckerSums):
    """A and G of a site whose inputs are indices: A is diagonal, their counts.

    The rule gives an index below 0 to positions that have no gradient, which are left out.
    """

    def __init__(
        self, site: Site, num_cases: int, like: Tensor, weight_sharing: WeightSharing
    ) -> None:
        super().__init__(site, num_cases, like, weight_sharing)
        self._indices: list[Tensor] = []

    def _zero_A(self, width: int) -> Tensor:
        return self._like.new_zeros(width)

    def add_inputs(self, calls: Sequence[SiteCall]) -> None:
        """Add to the diagonal of A."""
        self.calls = calls
        self._indices = [
            call.rule.input_rows(call.module, call.inputs, None).reshape(call.num_cases, -1)
            for call in calls
        ]
        positions = sum(indices.shape[1] for indices in self._indices)
        for columns, A in self._A.items():
            assert columns[0] == 0, "a diagonal A is not split"
            if self._reduces and positions > 1:
                A.add_(self._squared_counts(len(A)) / positions**2)
                continue
            for indices in self._indices:
                counts = torch.bincount(indices[indices >= 0], minlength=len(A)).to(A.dtype)
                A.add_(counts / (positions * len(indices) / self.num_cases))

    def _squared_counts(self, num_indices: int) -> Tensor:
        """Return, for each index, the sum over cases of the square of its count in the case."""
        by_case = torch.cat([part.expand(self.num_cases, -1) for part in self._indices], dim=1)
        cases = torch.arange(self.num_cases, device=by_case.device).unsqueeze(1)
        places = (cases * num_indices + by_case)[by_case >= 0]
        places, counts = torch.unique(places, return_counts=True)
        squares = counts.to(self._like.dtype).square()
        return self._like.new_zeros(num_indices).index_add_(0, places % num_indices, squares)

    def add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Add to G."""
        super().add_gradients(
            [
                gradient.reshape(-1, gradient.shape[-1]) * (indices.reshape(-1, 1) >= 0)
                for indices, gradient in zip(self._indices, gradients, strict=True)
            ]
        )

    def observed_gradient(self) -> ObservedGradient | None:
        """Return the sum of the derivatives at each index, one column for each."""
        if not self.calls:
            return None
        # Derivatives at the padding index are zero.
        indices = torch.cat([part.reshape(-1) for part in self._indices]).clamp(min=0)
        gradients = torch.cat(self.gradients)
        (width,) = {len(A) for A in self._A.values()}
        rows = gradients.new_zeros((width, gradients.shape[1])).index_add_(0, indices, gradients)
        return ObservedGradient(rows.T, gradients.square().sum().sqrt())


def _flat(rows: Tensor) -> Tensor:
    return rows.reshape(-1, rows.shape[-1])


def _columns(rows: Tensor, which: Range) -> Tensor:
    return rows if which == (0, rows.shape[1]) else rows[:, slice(*which)]


def add_second_moment(total: Tensor, rows: Tensor, weight: float = 1.0) -> None:
    """Add `weight X^T X` of `rows` X [n, d] to the symmetric `total` [d, d], in place.

    Only the lower triangle is computed, in panels of rows; the rest is copied from it.
    """
    order = len(total)
    for start in range(0, order, _PANEL):
        end = min(start + _PANEL, order)
        panel = total[start:end, :end]
        panel.addmm_(rows[:, start:end].T, rows[:, :end], alpha=weight)
        total[:start, start:end] = panel[:, :start].T
