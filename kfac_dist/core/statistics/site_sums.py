"""Sums over cases of the factors of one site, from the calls of its modules.

With cases n and positions r, the gradient of one case is the sum of `g_nr a_nr^T` over its
positions; all calls of all modules of a site are positions of the same weight.

A call whose input has no axis of cases has the derivatives of all cases summed. Where these are
independent samples of mean zero (sampled targets), the square of the sum is an unbiased sample of
the sum of squares: such a call counts as one case, its inputs as those of every case.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kfac_dist.core.blocks.block import Range
from kfac_dist.core.blocks.layer_rules import (
    input_rows,
    output_rows,
)
from kfac_dist.core.blocks.sites import Site, WeightSharing
from kfac_dist.core.factors import KroneckerPair, LayerFactors

# Columns computed at a time: narrower panels save more, and are multiplied less efficiently.
_PANEL = 256


class SiteCall(NamedTuple):
    """The input of one call of a module; `num_cases` is 1 where it has no axis of cases."""

    module: nn.Module
    inputs: Tensor
    num_cases: int


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
        """Tell whether the derivatives of single cases are known."""
        return all(call.num_cases == self.num_cases for call in self.calls)

    @abstractmethod
    def add_inputs(self, calls: Sequence[SiteCall]) -> None:
        """Take in the inputs of all calls."""

    @abstractmethod
    def add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Add derivatives with respect to the outputs of these calls."""


class KroneckerSums(SiteSums):
    """A and G, of which blocks with the same columns, or rows, have one tensor in common.

    *Expand*: A is the mean and G the sum over positions. *Reduce*: A is of the mean of a case's
    inputs, G of the sum of its derivatives.

    `inputs` and `gradients` are the rows of each call, [rows, dim]; `averaged_inputs` and
    `added_gradients` those that A and G are moments of, the same unless *reduced*.
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
        self._A = {columns: self._empty_A(width) for columns, width in widths.items()}
        self._G = {rows: like.new_zeros((height, height)) for rows, height in heights.items()}
        self.factors = {
            b.name: KroneckerPair(A=self._A[b.columns], G=self._G[b.rows]) for b in site.blocks
        }

    def _empty_A(self, width: int) -> Tensor:
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
            mean = reduce(torch.add, sums) / positions
            self.averaged_inputs = [mean]
            self._add_moments(mean, len(mean), 1)
            return
        self.averaged_inputs = self.inputs
        for rows, call in zip(self.inputs, calls, strict=True):
            self._add_moments(rows, call.num_cases, positions)

    def _add_moments(self, rows: Tensor, num_cases: int, positions: int) -> None:
        divisor = positions * num_cases / self.num_cases
        for columns, A in self._A.items():
            add_second_moment(A, _columns(rows, columns), weight=1 / divisor)

    def add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Add to G."""
        self.gradients = [
            output_rows(call.module, gradient, self.site.group)
            for call, gradient in zip(self.calls, gradients, strict=True)
        ]
        self.added_gradients = (
            [self.case_gradients().sum(dim=1)] if self._reduces else self.gradients
        )
        first = self.site.first_row
        for (start, end), G in self._G.items():
            for call in self.added_gradients:
                add_second_moment(G, _columns(call, (start - first, end - first)))

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
        rows = input_rows(call.module, call.inputs, self.site.group)
        if not self.site.has_bias:
            return rows
        ones = rows.new_ones((len(rows), 1))
        return torch.cat([rows, ones], dim=1) if self.site.has_weight else ones


class EmbeddingSums(KroneckerSums):
    """A is diagonal: counts of the indices. Positions with the padding index count as zero."""

    def _empty_A(self, width: int) -> Tensor:
        return self._like.new_zeros(width)

    def add_inputs(self, calls: Sequence[SiteCall]) -> None:
        """Add to the diagonal of A."""
        self.calls = calls
        indices = [call.inputs.reshape(call.num_cases, -1) for call in calls]
        positions = sum(call.shape[1] for call in indices)
        for columns, A in self._A.items():
            assert columns[0] == 0, "a diagonal is not split"
            if self._reduces and positions > 1:
                A.add_(self._reduced_counts(indices, len(A)) / positions**2)
                continue
            for call, kept in zip(indices, map(self._kept, calls), strict=True):
                counts = torch.bincount(call.flatten()[kept], minlength=len(A)).to(A.dtype)
                A.add_(counts / (positions * len(call) / self.num_cases))

    def _reduced_counts(self, indices: Sequence[Tensor], num_rows: int) -> Tensor:
        """Return the sums over cases of the squares of each index's count."""
        by_case = torch.cat([call.expand(self.num_cases, -1) for call in indices], dim=1)
        cases = torch.arange(self.num_cases, device=by_case.device).unsqueeze(1)
        kept = torch.cat(
            [
                self._kept(call).view_as(ids).expand(self.num_cases, -1)
                for call, ids in zip(self.calls, indices, strict=True)
            ],
            dim=1,
        )
        places, counts = torch.unique((cases * num_rows + by_case)[kept], return_counts=True)
        squares = counts.to(self._like.dtype).square()
        return self._like.new_zeros(num_rows).index_add_(0, places % num_rows, squares)

    def add_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Add to G."""
        super().add_gradients(
            [
                gradient.reshape(-1, gradient.shape[-1]) * self._kept(call).unsqueeze(1)
                for call, gradient in zip(self.calls, gradients, strict=True)
            ]
        )

    @staticmethod
    def _kept(call: SiteCall) -> Tensor:
        assert isinstance(call.module, nn.Embedding)
        indices, padding = call.inputs.reshape(-1), call.module.padding_idx
        return torch.ones_like(indices, dtype=torch.bool) if padding is None else indices != padding


def _columns(rows: Tensor, which: Range) -> Tensor:
    return rows if which == (0, rows.shape[1]) else rows[:, slice(*which)]


def add_second_moment(total: Tensor, rows: Tensor, weight: float = 1.0) -> None:
    """Add `weight X^T X` of `rows` X [n, d] to the symmetric `total` [d, d], in place.

    Panel by panel of the lower triangle, which is all that needs to be computed; what is above the
    panels is copied.
    """
    order = len(total)
    for start in range(0, order, _PANEL):
        end = min(start + _PANEL, order)
        panel = total[start:end, :end]
        panel.addmm_(rows[:, start:end].T, rows[:, :end], alpha=weight)
        total[:start, start:end] = panel[:, :start].T
